"""GeoRA: initialize the adapter with the main singular components of a masked weight.

Ŵ is the best rank-r approximation of W. An entry of W is kept if its size in Ŵ is among the
smallest, or its size in W itself:

    W_geo = W ∘ (|Ŵ| <= q(|Ŵ|) or |W| <= q(|W|)) = U S Vᵀ,
    B = U_r sqrt(S_r / s),    A = sqrt(S_r / s) V_rᵀ,

where q is the quantile of level `fraction`. The base becomes W - s B A. Reinforcement learning
changes mostly entries of these two kinds. The mask shapes the start only; training may change all
entries.

Source: Zhang et al., "GeoRA: Geometry-Aware Low-Rank Adaptation for RLVR", ACL 2026, arXiv
2601.09361, equations 1-8.
Deviations: there is no official code. The paper does not divide by the scaling; this code does, so
that s B A is the same at every s. Both agree at alpha = r. The quantile is an order statistic,
without interpolation, and entries equal to it are kept. PEFT does not have this method. With
fraction=1 every entry is kept, and the factors are those of `pissa`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer, workspace


@dataclass
class GeoraOptions(Options):
    """Settings of GeoRA.

    Attributes:
        fraction: the share of entries that each of the two masks keeps.
    """

    fraction: float = 0.2

    def __post_init__(self) -> None:
        number = isinstance(self.fraction, int | float) and not isinstance(self.fraction, bool)
        if not number or not 0.0 < self.fraction <= 1.0:
            raise ValueError(
                f"geora: fraction={self.fraction!r} is not supported: must be a number > 0 and <= 1"
            )


@register_initializer(
    "geora",
    options=GeoraOptions,
    paper="Zhang et al. 2026, arXiv 2601.09361",
    base="subtract",
    reads=("weight",),
    operations=("product", "convolution", "lookup"),
)
@batched
@workspace(6.0, 0.0)
def geora(layer: Layer, options: GeoraOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32, balanced: A Aᵀ = Bᵀ B = S_r / s."""
    weight = layer.weight
    size = linalg.nesting_rank(
        layer.rank, min(layer.shape), smallest=linalg.LEAST_TRIPLETS
    )  # as PiSSA
    main = linalg.top_singular(weight, size).leading(layer.rank)
    spectral = (main.left * main.values[..., None, :]) @ main.right.mT
    kept = smallest(spectral.abs_(), options.fraction) | smallest(weight.abs(), options.fraction)
    masked = torch.where(kept, weight, 0.0)
    triplets = linalg.top_singular(masked, size).leading(layer.rank)
    root = (triplets.values / layer.scaling).sqrt()
    return Factors(
        lora_A=root[..., None] * triplets.right.mT,
        lora_B=triplets.left * root[..., None, :],
        metrics={
            "algorithm": triplets.method,
            "residual": triplets.residual,
            "kept_entries": kept.double().mean((-2, -1)),
        },
    )


def smallest(
    sizes: Float[Tensor, "*stack out in"], fraction: float
) -> Bool[Tensor, "*stack out in"]:
    """Whether an entry is at most the quantile of level `fraction` of its matrix.

    `torch.quantile` has a limit of 2^24 numbers, which layers of language models exceed.
    """
    flat = sizes.flatten(-2)
    place = int(fraction * (flat.shape[-1] - 1)) + 1
    return sizes <= flat.kthvalue(place, keepdim=True).values[..., None]
