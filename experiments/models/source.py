"""Where a model comes from: what a source of models returns, and files in installed packages."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigurationError


@dataclass(frozen=True)
class Checkpoint:
    """A folder or hub name that transformers loads, and facts for every result."""

    source: str
    revision: str | None = None
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()


def packaged(package: str, file: str, fix: str) -> Path:
    """The path of a file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.exists():
        raise ConfigurationError(f"the package {package!r}, which ships {file}, is missing; {fix}")
    return path


def sha256(path: Path) -> str:
    """The hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
