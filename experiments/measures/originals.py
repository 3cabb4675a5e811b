"""Facts about the base before any initializer changed it: norms, and some spectra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_init.plan.plan import Plan
from lora_init.weights.source import BaseWeights

from ..config.records import MeasuresConfig
from .spectra import Spectrum, leading_spectrum


@dataclass(frozen=True)
class Originals:
    """Facts about the original weights, by layer, taken before a method may replace them.

    Attributes:
        norms: ‖W‖ (Frobenius) of every target.
        spectra: of the layers that `measures.spectra_layers` chooses.
    """

    norms: Mapping[str, float]
    spectra: Mapping[str, Spectrum]


@torch.no_grad()
def measure_originals(plan: Plan, weights: BaseWeights, settings: MeasuresConfig) -> Originals:
    """Read each target's weight once, one at a time."""
    chosen = set(spread([target.name for target in plan.targets], settings.spectra_layers))
    norms, spectra = {}, {}
    for target in plan.targets:
        weight = weights.weight(target)
        norms[target.name] = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        if target.name in chosen:
            spectra[target.name] = leading_spectrum(weight)
    return Originals(norms, spectra)


def spread(items: list[str], count: int | None) -> list[str]:
    """`count` of the items (None: all), evenly spaced: the middles of as many equal parts.

    The starts of the parts would be the same kind of layer in every block of a model.
    """
    if count is None or count >= len(items):
        return items
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]
