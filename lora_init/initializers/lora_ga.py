"""LoRA-GA: the first step of the factors follows the gradient of the whole weight.

G = dL/dW = U S Vᵀ, the mean gradient over the calibration batches. With k = m^(1/4) / sqrt(gamma),
m the number of outputs,

    A = k V[:, :r]ᵀ,    B = k U[:, r:2r],

and the base becomes W - s B A. One SGD step of rate λ moves s B A by -λ s² (B Bᵀ G + G Aᵀ A) up to
λ², here -λ (s k)² times a part of G that holds its 2r largest singular values: the best that
factors of rank r can follow G, up to the factor (theorem 3.1). Which 2r triplets fall to A and
which to B does not matter to that; the authors give A the first half.

Source: Wang, Yu & Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024,
arXiv 2407.05000, theorems 3.1 and 3.2, algorithm 1.
Deviations: theorem 3.1 has k = sqrt(ζ) / s, theorem 3.2 ζ ~ sqrt(m) / r for the scaling s =
alpha / sqrt(r) of rsLoRA; r cancels, alpha goes into gamma, and k is left without s. Ours is that k
at every s, as in the official code: W - s B A + s B A is W whatever s is, and the first step grows
with s². gamma = 16 is the authors' at alpha = 16 with `use_rslora=True`; with s = alpha / r,
gamma = s² r / 16 takes the same step. The official code takes a randomised SVD of 4r columns and 4
iterations, ours converged triplets; its other directions and scales are not served. PEFT 0.21
multiplies B by S and scales B alone by k, which is another method.
Gradients: the mean over batches of each batch's mean loss, as the official code; weighting every
token alike (sum of the losses over the number of labels) would let long batches count for more, and
is the same where all batches hold equally many labels. The official code runs in training mode,
with dropout where the model has any; ours does not. If G has fewer than 2r non-zero singular values
(a classifier's pooler sees one row a sequence), the rest are directions orthogonal to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer
from lora_init.weights.module_types import LINEAR_TYPES

# B takes the last half of the triplets, where a subspace that is good in total is worst. On
# MiniLM's gradients, r = 8, this brings 1 - overlap from 3e-4 to 1e-5, for no time to speak of.
TOLERANCE = 1e-6


@dataclass
class LoraGaOptions(Options):
    """Settings of LoRA-GA.

    Attributes:
        gamma: the factors' norms are k = m^(1/4) / sqrt(gamma); a larger one starts smaller.
    """

    gamma: float = 16.0

    def __post_init__(self) -> None:
        number = isinstance(self.gamma, int | float) and not isinstance(self.gamma, bool)
        if not number or not 0.0 < self.gamma < float("inf"):
            raise ValueError(f"lora_ga: gamma={self.gamma!r}; allowed are finite numbers > 0")

    def refuse_rank(self, rank: int, shape: tuple[int, int]) -> str | None:
        limit = min(shape) // 2
        if rank <= limit:
            return None
        return (
            f"A and B take 2r different singular vectors of the gradient, so r must be at most "
            f"{limit}"
        )


@register_initializer(
    "lora_ga",
    options=LoraGaOptions,
    paper="Wang et al. 2024, arXiv 2407.05000",
    base="subtract",
    reads=("gradient",),
    modules=(*LINEAR_TYPES, "Conv2d"),
)
@batched
def lora_ga(layer: Layer, options: LoraGaOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32, rows and columns orthogonal, of norm k each."""
    gradient, rank = layer.gradient, layer.rank
    triplets = linalg.top_singular(
        gradient, 2 * rank, generator=layer.generator, tolerance=TOLERANCE
    )
    norm = gradient.shape[-2] ** 0.25 / options.gamma**0.5
    return Factors(
        lora_A=norm * triplets.right[..., :rank].mT,
        lora_B=norm * triplets.left[..., rank:],
        metrics={"algorithm": triplets.method, "residual": triplets.residual},
    )
