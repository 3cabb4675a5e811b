"""Measures besides the score: at the start, during training, and at the end.

Measures read the model and the data. They do not draw random numbers or change parameters, so a
run's losses are the same with and without them, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_init import LoraModel

from ..config.records import MeasuresConfig
from .end import measure_end
from .original_model import OriginalModel
from .originals import Originals, measure_originals
from .spectra import describe_spectrum
from .start import describe_start
from .updates import is_due, update_size

__all__ = [
    "MeasuresConfig",
    "OriginalModel",
    "Originals",
    "describe_spectra",
    "describe_start",
    "measure_end",
    "measure_originals",
    "update_observer",
]


def update_observer(
    model: LoraModel,
    facts: Originals,
    settings: MeasuresConfig,
    steps: int,
    record: Callable[[dict[str, Any]], None],
) -> Callable[[int], None]:
    """A function for the training loop that records the update's size when it is due."""

    def observe(step: int) -> None:
        if is_due(step, steps, settings.update_every):
            size = update_size(model, facts.norms)
            record({"step": step, "split": "update", "update_size": size})

    return observe


def describe_spectra(model: LoraModel, facts: Originals) -> dict[str, Any]:
    """The content of spectra.json."""
    layers = model.layers
    rows = [
        describe_spectrum(name, spectrum, layers.get(name))
        for name, spectrum in facts.spectra.items()
    ]
    return {"layers": rows}
