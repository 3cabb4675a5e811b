"""LoRA-One: initialize the adapter with the best rank-r part of one full fine-tuning step.

G = dL/dW is the mean gradient over the calibration batches, and -G = U S Vᵀ. With gamma > 0,

    B = U_r sqrt(S_r / S_1) / sqrt(gamma),    A = sqrt(S_r / S_1) V_rᵀ / sqrt(gamma),

and the base stays. s B A = -(s / (gamma S_1)) G_r is a gradient descent step, cut to rank r. Its
largest singular value is s / gamma, whatever the size of the gradient. The model's output at step 0
therefore differs from the base model's: training continues from the point after the step.

Source: Zhang, Liu & Chen, "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large
Language Models, Provably and Efficiently", ICML 2025, arXiv 2502.01235, algorithm 1.
Deviations: the paper's algorithm has no S_1; the official code divides by it, and so does this one.
Neither divides the factors by s, so the step grows with s. The authors use gamma = 128 at
alpha = 16 with `use_rslora=True`; gamma = 8 s sqrt(r) takes the same step at any other s. The
official code takes a randomized SVD with 4r columns and 4 iterations; this code computes converged
triplets. The paper's preconditioner is part of the optimizer and is not implemented here. PEFT does
not have this method. The gradients are those of `lora_init.initializers.lora_ga`.
Where `calibration_memory` is too small for the gradients, G is replaced by a sketch of its leading
triplets, whose error `lora_init.calibration.sketch` states.
If G has fewer than r non-zero singular values, the other columns of B and rows of A are both zero.
Such pairs hardly learn; the report counts them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer


@dataclass
class LoraOneOptions(Options):
    """Settings of LoRA-One.

    Attributes:
        gamma: s B A has the largest singular value s / gamma; a larger gamma is a smaller step.
    """

    gamma: float = 128.0

    def __post_init__(self) -> None:
        number = isinstance(self.gamma, int | float) and not isinstance(self.gamma, bool)
        if not number or not 0.0 < self.gamma < float("inf"):
            raise ValueError(
                f"lora_one: gamma={self.gamma!r} is not supported: must be a finite number > 0"
            )

    def directions(self, rank: int, shape: tuple[int, int]) -> int | None:
        return rank


@register_initializer(
    "lora_one",
    options=LoraOneOptions,
    paper="Zhang, Liu & Chen 2025, arXiv 2502.01235",
    preserves_output=False,
    reads=("gradient",),
    operations=("product", "convolution"),
)
@batched
def lora_one(layer: Layer, options: LoraOneOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32, balanced: A Aᵀ = Bᵀ B = S_r / (gamma S_1)."""
    triplets = linalg.top_singular(layer.gradient, layer.rank, generator=layer.generator)
    # The clamp makes the factors zero where the whole gradient is zero.
    share = triplets.values / triplets.values[..., :1].clamp_min(torch.finfo(torch.float32).tiny)
    root = (share / options.gamma).sqrt()
    return Factors(
        lora_A=-root[..., None] * triplets.right.mT,  # gradient descent: -G
        lora_B=triplets.left * root[..., None, :],
        metrics={
            "algorithm": triplets.method,
            "residual": triplets.residual,
            "vanishing_components": (share <= torch.finfo(torch.float32).eps).sum(-1),
        },
    )
