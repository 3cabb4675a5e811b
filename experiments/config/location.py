"""Where this package is: `experiments` in a clone, `lora_init_experiments` when installed.

A clone has `conf/` next to the package, and the wheel has it inside.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = __name__.rsplit(".", 2)[0]
FOLDER = Path(__file__).resolve().parents[1]
CONFIGURATIONS = next(
    place for place in (FOLDER / "conf", FOLDER.parent / "conf") if (place / "train.yaml").is_file()
)


def qualified(module: str) -> str:
    """The full name of a module or class of this package; a resolver for YAML."""
    return f"{PACKAGE}.{module}"
