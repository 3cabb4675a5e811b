"""The applications, `experiments` in a clone: commands import them by name when they need them."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import lora_init

PACKAGES = ("lora_init_experiments", "experiments")
"""The name of the applications in an installation, and in a clone."""


def application(module: str) -> Any:
    """A module of the applications. The library does not depend on them.

    Raises:
        ValueError: the applications, or a package of the extra `experiments`, are not installed.
    """
    root = Path(lora_init.__file__).resolve().parents[1]
    found = [name for name in PACKAGES if (root / name / "compare.py").is_file()]
    if not found:
        raise ValueError(f"compare.py is in none of {', '.join(PACKAGES)} in {root}: reinstall")
    if found[0] not in sys.modules and str(root) not in sys.path:
        sys.path.append(str(root))  # a clone
    try:
        return import_module(f"{found[0]}.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"this command needs {error.name}, which is not installed: "
            "pip install 'lora_init[experiments]'"
        ) from error
