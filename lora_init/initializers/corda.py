"""CorDA: initialize the adapter from the SVD of W multiplied by the second moment of its inputs.

R = XᵀX / tokens is the uncentered second moment of the inputs, and W R = U S Vᵀ (thin). With r
triplets of this SVD, B = U sqrt(S / s) and A = sqrt(S / s) Vᵀ R⁻¹. Because Uᵀ (W R) = S Vᵀ, the
inverse cancels:

    A = Uᵀ W / sqrt(S s),    s B A = U Uᵀ W,

a projection of W. Only the left singular vectors of W R are computed. The base becomes W - s B A.

- "ipm" (instruction-previewed mode) takes the first r triplets, to learn the calibration task fast.
- "kpm" (knowledge-preserved mode) takes the last r, to keep what the calibration data represent.

Source: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models",
NeurIPS 2024, arXiv 2406.05223, equations 2-7.
Deviations: R is normalized differently. The official code divides every sample by its largest |x|
and the sum by 256. PEFT divides by the number of samples and by max(x), without the absolute
value. This code divides by the number of tokens. The scale of R does not change the product; it
only moves norm between the factors (c·R: B grows by sqrt(c), A shrinks by it).
The official code and PEFT add 0.01 · mean(diag R) to R's diagonal and double it until the inverse
is accurate, which changes U. This code needs no inverse; `damping=0.01` reproduces their first
step.
Where R is rank-deficient (fewer tokens than inputs), S falls below eps · ‖W R‖ and the split would
divide by almost zero. Those components are split evenly: B = U / sqrt(s), A = Uᵀ W / sqrt(s). The
report counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import CalibrationRequest, Options, batched, register_initializer, workspace

# R comes from float32 sums. Directions without any input carry noise of this size, relative to the
# mean diagonal. Adding it to R's diagonal makes the thin SVD of W R unique there: on the null space
# of R the limit is the SVD of W. It has no visible effect elsewhere.
NULL_SPACE_LIFT = 1e-6


@dataclass
class CordaOptions(Options):
    """Settings of CorDA.

    Attributes:
        corda_method: "ipm" (first r triplets) or "kpm" (last r).
        damping: added to the diagonal of R, relative to its mean; the official code adds 0.01.
    """

    corda_method: str = "ipm"
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise ValueError(
                f"corda: corda_method={self.corda_method!r} is not supported: must be 'ipm' (learn "
                "the task) or 'kpm' (preserve knowledge)"
            )
        number = isinstance(self.damping, int | float)
        if not number or not 0.0 <= self.damping < float("inf"):
            raise ValueError(
                f"corda: damping={self.damping!r} is not supported: must be a finite number >= 0"
            )

    def input_request(self) -> CalibrationRequest:
        return CalibrationRequest(smallest=self.corda_method == "kpm")

    def directions(self, rank: int, shape: tuple[int, int]) -> int | None:
        return rank if self.corda_method == "ipm" else None


@register_initializer(
    "corda",
    options=CordaOptions,
    paper="Yang et al. 2024, arXiv 2406.05223",
    base="subtract",
    reads=("weight", "inputs"),
    operations=("product", "convolution"),
)
@batched
@workspace(lambda options: (7.0, 4.0) if options.corda_method == "kpm" else (1.0, 3.0))
def corda(layer: Layer, options: CordaOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32; s B A is the projection U Uᵀ W."""
    second_moment = layer.inputs.second_moment
    mean_diagonal = second_moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    size = linalg.nesting_rank(layer.rank, min(layer.shape))
    if options.corda_method == "ipm":
        lifted = second_moment
        if options.damping:
            lifted = _lift(second_moment, options.damping * mean_diagonal)
        operator = _in_the_metric(layer.weight, lifted)
        triplets = linalg.top_singular(operator, size)
    else:
        lifted = _lift(second_moment, max(options.damping, NULL_SPACE_LIFT) * mean_diagonal)
        del second_moment  # in × in in float64, like `lifted`
        operator = linalg.Operator.product(layer.weight.double(), lifted)
        triplets = linalg.bottom_singular(operator, size)
    triplets = triplets.leading(layer.rank)
    left, values = triplets.left.float(), triplets.values.float()
    largest = triplets.largest.float()
    degenerate = values <= torch.finfo(torch.float32).eps * largest[..., None]
    split = torch.where(degenerate, torch.ones_like(values), values)
    return Factors(
        lora_A=(left.mT @ layer.weight) / (split * layer.scaling).sqrt()[..., None],
        lora_B=left * (split / layer.scaling).sqrt()[..., None, :],
        metrics={
            "algorithm": triplets.method,
            "residual": triplets.residual,
            "evenly_split_components": degenerate.sum(-1),
        },
    )


def _in_the_metric(weight, moment):
    """W R in float32, with a float64 form for where float32 is not accurate enough."""
    operator = linalg.Operator.product(weight, moment.to(weight.dtype))

    def members():
        pairs = zip(weight, moment, strict=True)
        return [_in_the_metric(*pair) for pair in pairs]

    return replace(
        operator,
        # Massive activations can put s_r at 1e-6 of s_1: R rounded to float32 is too coarse there.
        upcast=lambda: linalg.Operator.product(weight.double(), moment),
        members=members if weight.ndim > 2 else None,
    )


def _lift(matrix, amount):
    lifted = matrix.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(amount[..., None])
    return lifted
