"""The base before any initializer touched it: its norms, and some layers' spectra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from experiments.measures.settings import MeasuresConfig, spread
from experiments.measures.spectra import Spectrum, leading_spectrum
from lora_init.plan.plan import Plan
from lora_init.weights.source import BaseWeights


@dataclass(frozen=True)
class Originals:
    """Facts about the original weights, by layer; a replaced base cannot be asked later.

    Attributes:
        norms: ‖W‖ (Frobenius) of every target.
        spectra: of the few layers that `measures.spectra_layers` chooses.
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
