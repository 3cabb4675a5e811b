"""LoRA-DA: start at a natural-gradient step, in directions where the data estimate it well.

G = dL/dW is the mean gradient, C the second moment of the layer's inputs (n × n), and y the mean
square of the gradient by each of the m outputs. With the damping d and σ the largest singular value
of the first line,

    D = -diag(1 / (y + d)) G (C + d I)⁻¹,    then D = D / σ,
    Ω = -Dᵀ D + beta Σᵢ 1/(yᵢ + d) / (N σ²) (C + d I)⁻¹,
    E = eigenvectors of the r smallest eigenvalues of Ω,
    A = Eᵀ / sqrt(gamma),    B = D E / sqrt(gamma),

and the base stays. s B A = (s / gamma) D E Eᵀ is a step along D, cut to rank r. The output at step
0 therefore differs from the base model's. At beta = 0, B A is the best rank-r part of D / gamma.
The term with beta avoids directions that few inputs use, where the estimate is noisy. N is the
number of training examples. `lora_da_frozen` does not train A.

Source: Zhang et al., "LoRA-DA: Data-Aware Initialization for Low-Rank Adaptation via Asymptotic
Analysis", ICML 2026, arXiv 2510.24561.
Deviations: the formulas are those of the official code. The paper has A Aᵀ = I, B = D Aᵀ and no
gamma, beta or σ, and takes the diagonal of the inverse of E[g gᵀ]; the code inverts the diagonal.
The code computes Ω's eigenvectors by 10 unconverged LOBPCG steps; this code computes converged
ones. The code runs in training mode with batches of one example. This code runs in eval mode and
takes each batch's mean loss (see `lora_init.calibration.gradients`), so pass batches of one example
for the authors' values. The code's token mask by labels, its balancing of factors and its
low-rank Fisher are not supported. The scaling is not divided out: gamma = 1024 belongs to s = 5.66
(alpha = 16, r = 8, rsLoRA). With a mean loss y is far below d, and then has no effect: the report
shows `damping_ratio`, the median of y / d. `output_damping_ratio` sets d for y relative to y.
PEFT does not have this method.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import CalibrationRequest, Options, batched, register_initializer, workspace


@dataclass
class LoraDaOptions(Options):
    """Settings of LoRA-DA.

    Attributes:
        gamma: divides B A; a larger gamma is a smaller step.
        beta: weight of the term that avoids directions with noisy estimates.
        damping: d, added to C's diagonal and to y.
        output_damping_ratio: d for y, as a multiple of the median of y; None takes `damping`.
        examples: N, the number of training examples.
    """

    gamma: float = 1024.0
    beta: float = 0.03
    damping: float = 1e-6
    output_damping_ratio: float | None = None
    examples: int = 100_000

    def __post_init__(self) -> None:
        for name, least in (("gamma", False), ("beta", True), ("damping", False)):
            self._check(name, zero=least)
        if self.output_damping_ratio is not None:
            self._check("output_damping_ratio", zero=False)
        self._check("examples", zero=False)

    def _check(self, name: str, *, zero: bool) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0.0 <= value < float("inf") or (value == 0 and not zero):
            default = getattr(LoraDaOptions, name)
            raise ValueError(
                f"lora_da: {name}={value!r} is not supported: must be a finite number "
                f"{'>=' if zero else '>'} 0. The default is {default}"
            )

    def input_request(self) -> CalibrationRequest:
        return CalibrationRequest(smallest=True)  # the inverse of C needs its small eigenvalues


@dataclass
class LoraDaFrozenOptions(LoraDaOptions):
    """Settings of LoRA-DA with a frozen A: those of LoRA-DA."""

    frozen = ("lora_A",)


register = partial(
    register_initializer,
    paper="Zhang et al. 2025, arXiv 2510.24561",
    preserves_output=False,
    reads=("inputs", "gradient", "output_moments"),
    operations=("product", "convolution"),
)


@register("lora_da_frozen", options=LoraDaFrozenOptions)
@register("lora_da", options=LoraDaOptions)
@batched
@workspace(4.0, 9.5)
def lora_da(layer: Layer, options: LoraDaOptions) -> Factors:
    """A (rank, in) with A Aᵀ = I / gamma, and B (out, rank), float32."""
    squares = layer.output_moments.double()
    median = squares.median(-1, keepdim=True).values
    damping = options.damping
    if options.output_damping_ratio is not None:
        damping = (options.output_damping_ratio * median).clamp_min(torch.finfo().tiny)
    stiffness = 1 / (squares + damping)
    inverse = _damped_inverse(layer.inputs.second_moment, options.damping)
    step = -stiffness[..., None] * (layer.gradient.double() @ inverse)
    gram = step.mT @ step
    largest = linalg.top_eigen(gram, 1)[0][..., 0]
    # A layer without a gradient has no step: its directions are those of the inputs alone.
    square = torch.where(largest > 0, largest, torch.ones_like(largest))[..., None, None]
    noise = stiffness.sum(-1)[..., None, None] / (options.examples * square)
    omega = options.beta * noise * inverse - gram / square
    # The solver is for semi-definite matrices, and the largest eigenvalue of Dᵀ D is 1.
    omega.diagonal(dim1=-2, dim2=-1).add_(1)
    directions = linalg.bottom_eigen(omega, layer.rank)[1]
    image = step @ directions / square.sqrt()
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / square[..., 0, 0]
    tiny = torch.finfo().tiny
    return Factors(
        lora_A=directions.mT.float() / options.gamma**0.5,
        lora_B=image.float() / options.gamma**0.5,
        metrics={
            "sigma": largest.sqrt(),
            "damping_ratio": median[..., 0] / options.damping,
            "step_energy": image.square().sum((-2, -1)) / total.clamp_min(tiny),
        },
    )


def _damped_inverse(moment: Float[Tensor, "*stack in in"], damping: float) -> Tensor:
    """(C + d I)⁻¹ in float64."""
    damped = moment.double().clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
