"""Where a model comes from: the settings every source has, and what a source hands over."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from experiments.config.bounds import check_choice, check_label, check_number
from experiments.errors import ConfigurationError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelConfig:
    """What every model has.

    Attributes:
        name: the label in results and folder names.
        dropout: written over each dropout rate of the model's own configuration; 0 by default,
            since a comparison of initializations wants no noise that differs from run to run. None
            keeps the model's rates.
        quantization: nf4, nf4_double, fp4 or int8: bitsandbytes' format that the linear layers are
            loaded in, the head excepted. None keeps them in `dtype`.
        dtype: float32, bfloat16 or float16: of the base's weights, and of what a quantised layer
            computes in. Adapters are float32 whatever it is.
    """

    name: str = "model"
    dropout: float | None = 0.0
    quantization: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_label("model.name", self.name)
        check_number("model.dropout", self.dropout, least=0, below=1, null="the model's own")
        check_choice("model.dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class Checkpoint:
    """A folder or hub name that transformers loads, and facts that belong into every result."""

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
    """The file's hash, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
