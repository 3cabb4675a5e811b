"""Options under which a method that allocates ranks keeps them as they were planned."""

from __future__ import annotations

from lora_init.registry import get_initializer

UNIFORM = {"rho": 1.0, "smallest": 1.0, "largest": 1.0}


def uniform(method: str) -> dict[str, float]:
    """The values of `UNIFORM` for the options that the method has."""
    options = vars(get_initializer(method).options())
    return {name: value for name, value in UNIFORM.items() if name in options}
