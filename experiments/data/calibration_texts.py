"""Which examples a method that calibrates is given: training examples, or texts of another kind.

CorDA's knowledge-preserving mode wants the inputs that are to be preserved, not those of the task:
questions about the world for a model that is going to learn mathematics.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from experiments.config.bounds import check_integer, check_path
from experiments.data import Completion, Example, json_lines
from experiments.errors import ConfigurationError, nearest


@dataclass
class CalibrationConfig:
    """Examples for the methods that calibrate, drawn by `seeds.calibration`.

    Attributes:
        path: a file of JSON lines with the texts; None takes training examples.
        field: where in a line the text is.
    """

    samples: int = 256
    batch_size: int = 32
    path: str | None = None
    field: str = "question"

    def __post_init__(self) -> None:
        check_integer("calibration.samples", self.samples, 1)
        check_integer("calibration.batch_size", self.batch_size, 1)
        check_path("calibration.path", self.path, null="training examples")

    def contents(self) -> str:
        """A hash of the file: edited texts under an old path are another run."""
        return hashlib.sha256(existing(self).read_bytes()).hexdigest()


def existing(settings: CalibrationConfig) -> Path:
    path = Path(settings.path).expanduser()
    if not path.is_file():
        raise ConfigurationError(
            f"calibration.path={settings.path!r}: no such file (looked at {path.resolve()}); give "
            "a file of JSON lines, or null for training examples"
        )
    return path


def texts_of(settings: CalibrationConfig, task_type: str) -> list[Example]:
    """The file's texts as examples that are learnt whole.

    Raises:
        ConfigurationError: no such file, a line without the text, or a task with labels.
    """
    if task_type != "CAUSAL_LM":
        raise ConfigurationError(
            f"calibration.path={settings.path!r} is for language models, and the data have labels; "
            "set calibration.path=null"
        )
    examples: list[Example] = []
    try:
        lines = list(json_lines.read_lines(existing(settings)))
    except ValueError as error:
        raise ConfigurationError(
            f"calibration.path={settings.path!r}: not readable as JSON lines: {error}; correct "
            "the file"
        ) from error
    for number, row in lines:
        text = row.get(settings.field) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            known = list(row) if isinstance(row, dict) else []
            raise ConfigurationError(
                f"calibration.field={settings.field!r}: line {number} of {settings.path} has no "
                f"such text; {nearest(settings.field, known)}it has {', '.join(known) or 'none'}"
            )
        examples.append(Completion(number, prompt="", reasoning=text, answer=""))
    if not examples:
        raise ConfigurationError(f"calibration.path={settings.path!r}: the file has no lines")
    return examples
