"""LoRA-One: the adapter starts as the best rank-r part of one step of full fine-tuning.

G = dL/dW, the mean gradient over the calibration batches; -G = U S Vᵀ. With gamma > 0,

    B = U_r sqrt(S_r / S_1) / sqrt(gamma),    A = sqrt(S_r / S_1) V_rᵀ / sqrt(gamma),

and the base stays: s B A = -(s / (gamma S_1)) G_r is a step of gradient descent, cut to rank r; its
largest singular value is s / gamma, whatever the gradient's size. The model's function at step 0 is
therefore not the base model's, on purpose: training goes on from where the step has led.

Source: Zhang, Liu & Chen, "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large
Language Models, Provably and Efficiently", ICML 2025, arXiv 2502.01235, algorithm 1.
Deviations: the paper's algorithm has no S_1; the official code divides by it, and so do we. Neither
has s in the factors, so the step grows with s: gamma = 128 is the authors' at alpha = 16 with
`use_rslora=True`, and gamma = 8 s sqrt(r) takes the same step at any other s. The official code
takes a randomised SVD of 4r columns and 4 iterations, ours converged triplets. The paper's
preconditioner belongs to the optimizer and not here. Not in PEFT.
Gradients are those of `lora_init.initializers.lora_ga`. If G has fewer than r non-zero singular
values, the other columns of B and rows of A vanish together, and such pairs hardly learn: the
report counts them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer
from lora_init.weights.module_types import LINEAR_TYPES


@dataclass
class LoraOneOptions(Options):
    """Settings of LoRA-One.

    Attributes:
        gamma: the first step's largest singular value is s / gamma; a larger one steps less far.
    """

    gamma: float = 128.0

    def __post_init__(self) -> None:
        number = isinstance(self.gamma, int | float) and not isinstance(self.gamma, bool)
        if not number or not 0.0 < self.gamma < float("inf"):
            raise ValueError(f"lora_one: gamma={self.gamma!r}; allowed are finite numbers > 0")


@register_initializer(
    "lora_one",
    options=LoraOneOptions,
    paper="Zhang, Liu & Chen 2025, arXiv 2502.01235",
    preserves_output=False,
    reads=("gradient",),
    modules=(*LINEAR_TYPES, "Conv2d"),
)
@batched
def lora_one(layer: Layer, options: LoraOneOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32, balanced: A Aᵀ = Bᵀ B = S_r / (gamma S_1)."""
    triplets = linalg.top_singular(layer.gradient, layer.rank, generator=layer.generator)
    # Of a gradient that is zero throughout, no direction is better than another: no step.
    share = triplets.values / triplets.values[..., :1].clamp_min(torch.finfo(torch.float32).tiny)
    root = (share / options.gamma).sqrt()
    return Factors(
        lora_A=-root[..., None] * triplets.right.mT,  # the minus of the step
        lora_B=triplets.left * root[..., None, :],
        metrics={
            "algorithm": triplets.method,
            "residual": triplets.residual,
            "vanishing_components": (share <= torch.finfo(torch.float32).eps).sum(-1),
        },
    )
