"""Print the lowest versions that pyproject.toml allows: `lower_bounds.py torch` → `torch==2.6`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def lower_bound(package: str) -> str:
    """The requirement that pins a package at its lower bound."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(one for extra in extras for one in extra)]:
        match = re.fullmatch(rf"{package}>=([\d.]+)(,.*)?", requirement)
        if match:
            return f"{package}=={match[1]}"
    raise SystemExit(f"pyproject.toml has no lower bound for {package}: must be {package}>=VERSION")


if __name__ == "__main__":
    print(*map(lower_bound, sys.argv[1:]))
