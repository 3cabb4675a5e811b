"""LoRAM: initialize the factors with sine bases, scaled by the norm of W and the rank.

Φ_d (d × r) holds the first r columns of the orthonormal discrete sine transform of d points:

    Φ_d[i, j] = sqrt(2 / (d + 1)) sin((i + 1)(j + 1) π / (d + 1)),
    B = β Φ_out,    A = β Φ_inᵀ,    β = (log_min(out, in)(r) · ν[W] / ν[s Φ_out Φ_inᵀ])^(1/4),

where ν is the mean square of the entries. The base becomes W - s B A. Because ‖Φ_out Φ_inᵀ‖_F² is
r, β² = ‖W‖_F sqrt(log_min(out, in)(r) / r) / s and ‖s B A‖_F = ‖W‖_F sqrt(log_min(out, in)(r)).
That is about the norm of PiSSA's product, without a decomposition and without random numbers.

Source: Zhang, Li, Zhang, Gong, Wang, Hu, Liu & Jiang, "The Primacy of Magnitude in Low-Rank
Adaptation", NeurIPS 2025, arXiv 2507.06558, equations 11 and 12, algorithm 1.
Deviations: the paper fixes s = 1. This code divides by s, so that s B A is the same at every s. At
r = 1 the logarithm is 0 and both factors would be zero, so r must be at least 2. PEFT does not have
this method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer, workspace


@dataclass
class LoramOptions(Options):
    """Settings of LoRAM: none."""

    def refuse_rank(self, rank: int, shape: tuple[int, int]) -> str | None:
        if rank >= 2:
            return None
        return "both factors grow with log(r), which is 0 at r = 1: r must be at least 2"


def sine_basis(size: int, rank: int, device: torch.device) -> Float[Tensor, "size rank"]:
    """The first `rank` columns of the orthonormal sine transform (DST-I), in float64."""
    place = torch.arange(1, size + 1, dtype=torch.float64, device=device)
    angle = torch.outer(place, place[:rank]) * (math.pi / (size + 1))
    return angle.sin() * math.sqrt(2 / (size + 1))


@register_initializer(
    "loram",
    options=LoramOptions,
    paper="Zhang et al. 2025, arXiv 2507.06558",
    base="subtract",
    reads=("weight",),
    operations=("product", "convolution", "lookup"),
)
@batched
@workspace(3.0, 0.0)
def loram(layer: Layer, options: LoramOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32: rows and columns orthogonal, of norm β each."""
    (rows, columns), rank = layer.shape, layer.rank
    norm = linalg.frobenius_norm(layer.weight)[..., None, None]
    gain = math.log(rank) / math.log(min(rows, columns))
    beta = (norm * (math.sqrt(gain / rank) / layer.scaling)).sqrt()
    return Factors(
        lora_A=(beta * sine_basis(columns, rank, layer.weight.device).T).float(),
        lora_B=(beta * sine_basis(rows, rank, layer.weight.device)).float(),
    )
