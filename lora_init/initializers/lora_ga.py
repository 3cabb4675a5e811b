"""LoRA-GA: initialize the adapter so that its first step follows the gradient of the full weight.

G = dL/dW = U S Vᵀ is the mean gradient over the calibration batches. With k = m^(1/4) / sqrt(gamma)
and m outputs,

    A = k V[:, :r]ᵀ,    B = k U[:, r:2r],

and the base becomes W - s B A. One SGD step of rate λ moves s B A by -λ s² (B Bᵀ G + G Aᵀ A), up to
terms in λ². Here that is -λ (s k)² times a part of G that holds its 2r largest singular values. No
factors of rank r can follow G better, up to scale (theorem 3.1). It does not matter which of the 2r
triplets belong to A; the authors give A the first half. `direction` chooses the triplets of A, and
B takes the others:

- "ArB2r": A takes the first r triplets;
- "A2rBr": A takes the last r of the 2r triplets (LOI of RiemannLoRA, arXiv 2507.12142);
- "ArBr": A takes the triplets 2, 4, …, and B takes 1, 3, …;
- "random": A takes a random half.

`scale` chooses k:

- "stable": m^(1/4) / sqrt(gamma), as above;
- "unit": 1;
- "gd": 1 / s;
- "weight_svd": the mean of sqrt(S_i(W) / s) over the r largest singular values of W.

Source: Wang, Yu & Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024,
arXiv 2407.05000, theorems 3.1 and 3.2, algorithm 1.
Deviations: theorem 3.1 has k = sqrt(ζ) / s. Theorem 3.2 has ζ ~ sqrt(m) / r for the scaling
s = alpha / sqrt(r) of rsLoRA. Then r cancels, alpha becomes part of gamma, and k does not depend
on s. This code uses that k at every s, as the official code does. W - s B A + s B A is W for every
s, and the first step grows with s². The authors use gamma = 16 at alpha = 16 with
`use_rslora=True`. With s = alpha / r, gamma = s² r / 16 takes the same step.
The official code takes a randomized SVD with 4r columns and 4 iterations; this code computes
converged triplets. Options have the meaning of the official code, whose names "weightS" and
"gd_scale" are "weight_svd" and "gd" here. Its `norm_clip` is not supported.
PEFT 0.21 multiplies B by S under every scale. Its "stable" scales only B by k, and its "weight_svd"
multiplies B by S_1(W) / S_1. These are different methods. Its "random" gives A and B the same r
triplets, so that the first step holds only r singular values of G. Here the halves are disjoint.
G is the mean over batches of each batch's mean loss, as in the official code. Weighting every token
equally would give long batches more weight. Both are the same where all batches have equally many
labels. The official code runs in training mode, with the model's dropout; this code does not.
Where `calibration_memory` is too small for the gradients, G is replaced by a sketch of its leading
triplets, whose error `lora_init.calibration.sketch` states.
If G has fewer than 2r non-zero singular values, the remaining vectors are arbitrary directions
orthogonal to the others. An example is a classifier's pooler, which reads one row per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, Reads, batched, register_initializer, workspace

# B takes the last half of the triplets, which converge last. The default tolerance would leave
# their subspace inaccurate.
TOLERANCE = 1e-6

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "weight_svd")


@dataclass
class LoraGaOptions(Options):
    """Settings of LoRA-GA.

    Attributes:
        gamma: with scale="stable", rows of A and columns of B have norm m^(1/4) / sqrt(gamma).
        direction: the triplets of A: "ArB2r" (the first r), "A2rBr", "ArBr" or "random".
        scale: the norm k of the rows of A and columns of B: "stable", "unit", "gd" or "weight_svd".
    """

    gamma: float = 16.0
    direction: str = "ArB2r"
    scale: str = "stable"

    def __post_init__(self) -> None:
        number = isinstance(self.gamma, int | float) and not isinstance(self.gamma, bool)
        if not number or not 0.0 < self.gamma < float("inf"):
            raise ValueError(
                f"lora_ga: gamma={self.gamma!r} is not supported: must be a finite number > 0"
            )

        for name, supported in (("direction", DIRECTIONS), ("scale", SCALES)):
            if getattr(self, name) not in supported:
                raise ValueError(
                    f"lora_ga: {name}={getattr(self, name)!r} is not supported: must be one of "
                    f"{', '.join(supported)}"
                )

    def also_reads(self) -> frozenset[Reads]:
        return frozenset({"weight"} if self.scale == "weight_svd" else ())

    def directions(self, rank: int, shape: tuple[int, int]) -> int | None:
        return 2 * rank

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
    operations=("product", "convolution"),
)
@batched
@workspace(4.0, 0.0)
def lora_ga(layer: Layer, options: LoraGaOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32, rows and columns orthogonal, of norm k each."""
    gradient, rank = layer.gradient, layer.rank
    triplets = linalg.top_singular(
        gradient, 2 * rank, generator=layer.generator, tolerance=TOLERANCE
    )
    norm = factor_norm(layer, options)
    of_A, of_B = halves(layer, options.direction)
    return Factors(
        lora_A=norm * columns_at(triplets.right, of_A).mT,
        lora_B=norm * columns_at(triplets.left, of_B),
        metrics={"algorithm": triplets.method, "residual": triplets.residual},
    )


def halves(layer: Layer, direction: str) -> tuple[slice | Tensor, slice | Tensor]:
    """The triplets of A and of B: slices, or disjoint indices (rank,) or (stack, rank)."""
    rank = layer.rank
    first, last = slice(0, rank), slice(rank, 2 * rank)
    if direction == "ArB2r":
        return first, last
    if direction == "A2rBr":
        return last, first
    if direction == "ArBr":
        return slice(1, None, 2), slice(0, None, 2)
    order = torch.stack(
        [torch.randperm(2 * rank, generator=each, device="cpu") for each in layer.generators]
    )
    order = order if layer.is_stack else order[0]
    return order[..., :rank], order[..., rank:]


def columns_at(
    vectors: Float[Tensor, "*stack size k"], where: slice | Int[Tensor, "*stack rank"]
) -> Float[Tensor, "*stack size rank"]:
    """Some columns of each matrix."""
    if isinstance(where, slice):
        return vectors[..., where]
    where = where.to(vectors.device)[..., None, :].expand(*vectors.shape[:-1], -1)
    return vectors.gather(-1, where)


def factor_norm(layer: Layer, options: LoraGaOptions) -> float | Float[Tensor, "*stack 1 1"]:
    """k, the norm of the rows of A and the columns of B."""
    if options.scale == "stable":
        return layer.shape[0] ** 0.25 / options.gamma**0.5
    if options.scale == "weight_svd":
        values = linalg.top_singular(layer.stored_weight, layer.rank).values
        return (values / layer.scaling).sqrt().mean(-1)[..., None, None]
    return 1.0 if options.scale == "unit" else 1 / layer.scaling
