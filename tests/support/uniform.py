"""Options under which a method that allocates ranks keeps them as they were planned."""

from __future__ import annotations

UNIFORM = {"eva": {"rho": 1.0}, "gora": {"smallest": 1.0, "largest": 1.0}}


def uniform(method: str) -> dict[str, float]:
    return UNIFORM.get(method, {})
