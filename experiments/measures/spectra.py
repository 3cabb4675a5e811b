"""The spectrum of a weight, and the part of it that a start uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.layers import LoraLayer
from lora_init.linalg import top_singular
from lora_init.linalg.matrix import widened

from .angles import span

LEADING = 64  # directions: as many as common ranks, and enough to draw how a spectrum falls


@dataclass(frozen=True)
class Spectrum:
    """Leading singular values, descending, and right singular vectors, as columns; on the CPU."""

    values: Float[Tensor, " k"]
    right: Float[Tensor, "in k"]


def leading_spectrum(weight: Float[Tensor, "out in"]) -> Spectrum:
    """The `LEADING` largest singular values (all, if there are fewer)."""
    triplets = top_singular(widened(weight), min(LEADING, *weight.shape))
    return Spectrum(triplets.values.cpu(), triplets.right.cpu())


def taken(spectrum: Spectrum, lora_A: Float[Tensor, "rank in"]) -> Float[Tensor, " k"] | None:
    """The share of each right singular vector v in the row space of A: ‖Qᵀ v‖², Q a basis of it.

    It is the sum of squared cosines between v and the directions of A. None if A is zero.
    """
    basis = span(lora_A.detach().cpu().T)
    if basis.shape[1] == 0:
        return None
    return (basis.T @ spectrum.right.double()).square().sum(0)


def describe_spectrum(name: str, spectrum: Spectrum, layer: LoraLayer | None) -> dict[str, Any]:
    """A row of spectra.json; a layer without an adapter uses nothing."""
    if layer is None:
        shares = torch.zeros_like(spectrum.values)
    else:
        shares = taken(spectrum, layer.initial_lora_A)
    return {
        "name": name,
        "singular_values": spectrum.values.tolist(),
        "taken": None if shares is None else shares.tolist(),
    }
