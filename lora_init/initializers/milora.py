"""MiLoRA: the minor singular components of W are trained, the principal ones are frozen.

W = U S Vᵀ (thin, min(out, in) triplets). Of its last r triplets, B = U_r sqrt(S_r / s),
A = sqrt(S_r / s) V_rᵀ; the base becomes W - s B A. It is PiSSA from the other end of the spectrum:
what is trained starts where W does least.

Source: Wang, Li, Wang, Chen & Chen, "MiLoRA: Harnessing Minor Singular Components for
Parameter-Efficient LLM Finetuning", NAACL 2025, arXiv 2406.09044.
Deviations: the authors fix alpha = r, so s = 1; ours divides by s, which is the same there and
leaves s B A alone at any other s. They take a full SVD in float32, where the smallest values of a
matrix are mostly rounding; ours computes the last triplets only, in float64. Ascending, the
smallest first: the factors of rank r are the first r of those of a higher rank. Not in PEFT.
Where W has fewer than r triplets above its own rounding (eps · S_1), the others' columns of B and
rows of A vanish together, and such pairs hardly learn: the report counts them.
"""

from __future__ import annotations

import torch

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer
from lora_init.weights.module_types import MODULE_TYPES


@register_initializer(
    "milora",
    paper="Wang et al. 2024, arXiv 2406.09044",
    base="subtract",
    reads=("weight",),
    modules=MODULE_TYPES,
)
@batched
def milora(layer: Layer, options: Options) -> Factors:
    """A (rank, in) and B (out, rank), float32, balanced: A Aᵀ = Bᵀ B = S_r / s, ascending."""
    size = linalg.nesting_rank(layer.rank, min(layer.shape))
    triplets = linalg.bottom_singular(layer.stored_weight, size).leading(layer.rank)
    rounding = torch.finfo(torch.float32).eps * triplets.largest
    root = (triplets.values / layer.scaling).sqrt()
    return Factors(
        lora_A=root[..., None] * triplets.right.mT,
        lora_B=triplets.left * root[..., None, :],
        metrics={
            "algorithm": triplets.method,
            "residual": triplets.residual,
            "vanishing_components": (triplets.values <= rounding[..., None]).sum(-1),
        },
    )
