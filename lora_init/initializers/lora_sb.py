"""LoRA-SB: start a trained r × r core at the first AdamW step of full fine-tuning.

G = dL/dW is the mean gradient over the calibration batches. The first step of AdamW with the rate
`step` is -step sign(G) = U S Vᵀ. The layer computes W x + s B R A x with

    B = U_r,    A = V_rᵀ,    R = S_r / s,

so that s B R A is the best rank-r part of that step. A and B are frozen, and R (rank × rank), the
core, is trained. The base stays, so the model's output at step 0 differs from the base model's.
With orthonormal A and B, a gradient step on R moves W by s² B Bᵀ G Aᵀ A, a projection of the full
step.

Saving: the adapter file holds A and B R, a plain LoRA of rank r for every loader. A second file
holds B and R (see `lora_init.adapters.core_file`), and loading it here trains R again.

Source: Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely
Efficient Low-Rank Fine-Tuning", 2024, arXiv 2411.19557.
Deviations: the official code sets alpha = r, so that s = 1; this code divides R by s, so the start
is the same for every s. `step` is the first rate of the schedule, lr / (warm-up share × steps); the
default is that of the paper's MetaMathQA runs. The official code takes a randomized SVD without
oversampling and rounds the factors to bfloat16; this code computes converged triplets in float32.
It accumulates the gradient of 50 examples in training mode; this code runs in eval mode. Entries of
G that are 0 stay 0. The spectrum of sign(G) is flat: the report shows `step_energy`, the share of
the step that rank r holds. PEFT does not have this method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer


@dataclass
class LoraSbOptions(Options):
    """Settings of LoRA-SB.

    Attributes:
        step: the learning rate of the first full fine-tuning step, after warm-up is applied.
    """

    has_core = True
    step: float = 3.2e-6

    def __post_init__(self) -> None:
        number = isinstance(self.step, int | float) and not isinstance(self.step, bool)
        if not number or not 0.0 < self.step < float("inf"):
            raise ValueError(
                f"lora_sb: step={self.step!r} is not supported: must be a finite number > 0. Use "
                "the first learning rate of the schedule"
            )


@register_initializer(
    "lora_sb",
    options=LoraSbOptions,
    paper="Ponkshe et al. 2024, arXiv 2411.19557",
    preserves_output=False,
    reads=("gradient",),
    operations=("product", "convolution"),
)
@batched
def lora_sb(layer: Layer, options: LoraSbOptions) -> Factors:
    """A (rank, in) and B (out, rank), orthonormal, and R (rank, rank) diagonal; float32."""
    signs = layer.gradient.sign()
    triplets = linalg.top_singular(signs, layer.rank, generator=layer.generator)
    total = signs.square().sum((-2, -1)).clamp_min(1)
    return Factors(
        lora_A=-triplets.right.mT,  # gradient descent: -sign(G)
        lora_B=triplets.left,
        core=torch.diag_embed(options.step * triplets.values / layer.scaling),
        metrics={
            "algorithm": triplets.method,
            "residual": triplets.residual,
            "step_energy": triplets.values.square().sum(-1) / total,
        },
    )
