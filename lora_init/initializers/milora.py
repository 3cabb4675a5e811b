"""MiLoRA: train the smallest singular components of W, and freeze the rest.

W = U S Vᵀ (thin, min(out, in) triplets). With its last r triplets, B = U_r sqrt(S_r / s) and
A = sqrt(S_r / s) V_rᵀ. The base becomes W - s B A. It is PiSSA at the other end of the spectrum:
the adapter starts from the directions where W does least.

Source: Wang, Li, Wang, Chen & Chen, "MiLoRA: Harnessing Minor Singular Components for
Parameter-Efficient LLM Finetuning", NAACL 2025, arXiv 2406.09044.
Deviations: the authors fix alpha = r, so s = 1. This code divides by s, so that s B A is the same
at every s. The authors take a full SVD in float32, where the smallest values of a matrix are mostly
rounding. This code computes only the last triplets, in float64, the smallest first. So the factors
of rank r are the first r of those of a higher rank. PEFT does not have this method.
Where W has fewer than r triplets above its rounding (eps · S_1), the other columns of B and rows of
A are both almost zero. Such pairs hardly learn; the report counts them.
"""

from __future__ import annotations

import torch

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer, workspace


@register_initializer(
    "milora",
    paper="Wang et al. 2024, arXiv 2406.09044",
    base="subtract",
    reads=("weight",),
    operations=("product", "convolution", "lookup"),
)
@batched
@workspace(9.0, 0.0)
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
