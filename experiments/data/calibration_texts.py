"""Calibration texts of the user, for methods that preserve what the model knows about them."""

from __future__ import annotations

from ..config.inputs import CalibrationConfig
from ..errors import ConfigurationError, nearest
from . import json_lines
from .examples import Completion, Example


def texts_of(settings: CalibrationConfig, task_type: str) -> list[Example]:
    """The texts in `calibration.path`, as examples without a prompt.

    Raises:
        ConfigurationError: the file does not exist, a line has no text, or the task has labels.
    """
    setting = f"calibration.path={settings.path!r}"
    if task_type != "CAUSAL_LM":
        raise ConfigurationError(
            f"{setting} is for language models, and the data have labels; set calibration.path=null"
        )
    try:
        lines = list(json_lines.read_lines(settings.file()))
    except ConfigurationError:
        raise
    except ValueError as error:
        message = f"{setting}: not readable as JSON lines: {error}; correct the file"
        raise ConfigurationError(message) from error
    examples: list[Example] = []
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
        raise ConfigurationError(f"{setting}: the file has no lines")
    return examples
