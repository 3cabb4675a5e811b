"""LoRA-GA: initialize the adapter so that its first step follows the gradient of the full weight.

G = dL/dW = U S Vᵀ is the mean gradient over the calibration batches. With k = m^(1/4) / sqrt(gamma)
and m outputs,

    A = k V[:, :r]ᵀ,    B = k U[:, r:2r],

and the base becomes W - s B A. One SGD step of rate λ moves s B A by -λ s² (B Bᵀ G + G Aᵀ A), up to
terms in λ². Here that is -λ (s k)² times a part of G that holds its 2r largest singular values. No
factors of rank r can follow G better, up to scale (theorem 3.1). It does not matter which of the 2r
triplets belong to A; the authors give A the first half.

Source: Wang, Yu & Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024,
arXiv 2407.05000, theorems 3.1 and 3.2, algorithm 1.
Deviations: theorem 3.1 has k = sqrt(ζ) / s. Theorem 3.2 has ζ ~ sqrt(m) / r for the scaling
s = alpha / sqrt(r) of rsLoRA. Then r cancels, alpha becomes part of gamma, and k does not depend
on s. This code uses that k at every s, as the official code does. W - s B A + s B A is W for every
s, and the first step grows with s². The authors use gamma = 16 at alpha = 16 with
`use_rslora=True`. With s = alpha / r, gamma = s² r / 16 takes the same step.
The official code takes a randomized SVD with 4r columns and 4 iterations; this code computes
converged triplets. The official code's other directions and scales are not supported. PEFT 0.21
multiplies B by S and scales only B by k, which is a different method.
G is the mean over batches of each batch's mean loss, as in the official code. Weighting every token
equally would give long batches more weight. Both are the same where all batches have equally many
labels. The official code runs in training mode, with the model's dropout; this code does not.
If G has fewer than 2r non-zero singular values, the remaining vectors are arbitrary directions
orthogonal to the others. An example is a classifier's pooler, which reads one row per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer
from lora_init.weights.module_types import LINEAR_TYPES

# B takes the last half of the triplets, which converge last. The default tolerance would leave
# their subspace inaccurate.
TOLERANCE = 1e-6


@dataclass
class LoraGaOptions(Options):
    """Settings of LoRA-GA.

    Attributes:
        gamma: the rows of A and columns of B have norm m^(1/4) / sqrt(gamma).
    """

    gamma: float = 16.0

    def __post_init__(self) -> None:
        number = isinstance(self.gamma, int | float) and not isinstance(self.gamma, bool)
        if not number or not 0.0 < self.gamma < float("inf"):
            raise ValueError(
                f"lora_ga: gamma={self.gamma!r} is not supported: must be a finite number > 0"
            )

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
