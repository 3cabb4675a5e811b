"""LoRA-XS: train only an r × r matrix between the leading singular vectors of W.

W = U S Vᵀ, and the layer computes W x + s B R A x with

    A = S_r V_rᵀ,    B = U_r,    R ~ N(0, std²).

A and B are frozen. R (rank × rank), the core, is the only trained matrix, so a layer has r²
trainable parameters whatever its size. The base stays. At step 0 the output differs from the base
model's by the noise in R; `std=0` makes both equal.

Saving: the adapter file holds A and B R, a plain LoRA of rank r for every loader. A second file
holds B and R (see `lora_init.adapters.core_file`), and loading it here trains R again.

Source: Bałazy, Banaei, Aberer & Tabor, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of
Parameters", 2024, arXiv 2405.17604.
Deviations: the official code takes a truncated randomized SVD with 10 iterations; this code
computes converged triplets. The scaling is alpha / r, as in the official code, which uses
alpha = 64 at r = 32. PEFT does not have this method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.draws import normal
from lora_init.registry import Options, batched, register_initializer, workspace


@dataclass
class LoraXsOptions(Options):
    """Settings of LoRA-XS.

    Attributes:
        std: standard deviation of the entries of R.
    """

    has_core = True
    std: float = 1e-5

    def __post_init__(self) -> None:
        number = isinstance(self.std, int | float) and not isinstance(self.std, bool)
        if not number or not 0.0 <= self.std < float("inf"):
            raise ValueError(
                f"lora_xs: std={self.std!r} is not supported: must be a finite number >= 0. The "
                "default is 1e-5"
            )


@register_initializer(
    "lora_xs",
    options=LoraXsOptions,
    paper="Bałazy et al. 2024, arXiv 2405.17604",
    preserves_output=False,
    reads=("weight",),
    operations=("product", "convolution", "lookup"),
)
@batched
@workspace(3.0, 0.0)
def lora_xs(layer: Layer, options: LoraXsOptions) -> Factors:
    """A (rank, in), B (out, rank) with orthonormal columns and R (rank, rank), float32."""
    size = linalg.nesting_rank(layer.rank, min(layer.shape))
    triplets = linalg.top_singular(layer.stored_weight, size).leading(layer.rank)
    cores = [
        options.std * normal(layer.rank, layer.rank, generator=generator)
        for generator in layer.generators
    ]
    return Factors(
        lora_A=triplets.values[..., None] * triplets.right.mT,
        lora_B=triplets.left,
        core=torch.stack(cores).view(*layer.stack, layer.rank, layer.rank).to(triplets.left),
        metrics={"algorithm": triplets.method, "residual": triplets.residual},
    )
