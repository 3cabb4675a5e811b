"""The settings that every model, every data source and every calibration has."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigurationError
from .bounds import (
    check_choice,
    check_integer,
    check_label,
    check_number,
    check_path,
)

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelConfig:
    """The settings of every model.

    Attributes:
        name: the label in results and folder names.
        dropout: replaces every dropout rate of the model's own configuration; None keeps them. 0
            by default: noise that differs between runs makes a comparison less exact.
        quantization: nf4, nf4_double, fp4 or int8: the bitsandbytes format of the linear layers
            below the head. None keeps them in `dtype`.
        dtype: float32, bfloat16 or float16, for the base's weights and for the arithmetic of
            quantized layers. Adapters are always float32.
    """

    name: str = "model"
    dropout: float | None = 0.0
    quantization: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_label("model.name", self.name)
        check_number("model.dropout", self.dropout, least=0, below=1, null="the model's own")
        check_choice("model.dtype", self.dtype, DTYPES)


@dataclass
class DataConfig:
    """The settings of every data source.

    Attributes:
        name: the label in results and folder names.
        train_limit, validation_limit, test_limit: the most examples of each split; None takes
            all. No seed decides which examples are taken.
    """

    name: str = "data"
    train_limit: int | None = None
    validation_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        check_label("data.name", self.name)
        for split, least in (("train", 1), ("validation", 0), ("test", 1)):
            limit = getattr(self, f"{split}_limit")
            check_integer(f"data.{split}_limit", limit, least, null="all examples")


@dataclass
class CalibrationConfig:
    """Which examples the methods that calibrate get; `seeds.calibration` draws them.

    A knowledge-preserving method such as CorDA's kpm mode needs texts that the model should
    remember, not texts of the task: set `path` for it.

    Attributes:
        path: a file of JSON lines with texts; None takes training examples.
        field: the key of the text in each line.
    """

    samples: int = 256
    batch_size: int = 32
    path: str | None = None
    field: str = "question"

    def __post_init__(self) -> None:
        check_integer("calibration.samples", self.samples, 1)
        check_integer("calibration.batch_size", self.batch_size, 1)
        check_path("calibration.path", self.path, null="training examples")

    def file(self) -> Path:
        """The file with the texts.

        Raises:
            ConfigurationError: it does not exist.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ConfigurationError(
                f"calibration.path={self.path!r}: no such file (looked at {path.resolve()}); "
                "give a file of JSON lines, or null for training examples"
            )
        return path

    def contents(self) -> str:
        """A hash of the file: edited texts under the same path are another run."""
        return hashlib.sha256(self.file().read_bytes()).hexdigest()
