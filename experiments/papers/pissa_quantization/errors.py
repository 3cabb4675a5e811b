"""The error that a method leaves, and its size by four measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import init_factors
from lora_init.quantization import Quantizer

NORMS = ("nuclear", "frobenius", "spectral", "output")


@dataclass(frozen=True)
class Norms:
    """Of an error E, in float64.

    Attributes:
        nuclear: the sum of the singular values, the paper's.
        frobenius: the root of the sum of their squares.
        spectral: the largest.
        output: sqrt(tr(E R Eᵀ)), the root mean square of ‖E x‖ over inputs x of second moment R;
            None where no inputs are known.
    """

    nuclear: float
    frobenius: float
    spectral: float
    output: float | None = None

    def reductions(self, of: Norms) -> dict[str, float]:
        """100 (1 - self / of) by measure."""
        mine, plain = asdict(self), asdict(of)
        return {n: 100 * (1 - mine[n] / plain[n]) for n in NORMS if mine[n] is not None}


@torch.no_grad()
def norms_of(error: Float[Tensor, "out in"], moment: Float[Tensor, "in in"] | None = None) -> Norms:
    """All of them from the eigenvalues of the smaller Gram matrix.

    Squaring costs singular values below 1e-8 of the largest their digits; errors of a quantizer
    have none, and a sum of them would not notice.
    """
    error = error.double()
    squares = squared_values(error)
    values = squares.sqrt()
    output = None
    if moment is not None:
        output = float(((error @ moment.double()) * error).sum().clamp_min(0).sqrt())
    return Norms(float(values.sum()), float(squares.sum().sqrt()), float(values[0]), output)


def squared_values(matrix: Float[Tensor, "out in"]) -> Float[Tensor, " k"]:
    """The squares of its singular values, descending, in float64."""
    matrix = matrix.double()
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(tall.T @ tall).clamp_min(0).flip(0)


def plain_error(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """W - nf4(W), blocks of 64: what both methods are compared with."""
    return weight.double() - Quantizer().roundtrip(weight).double()


@torch.no_grad()
def remaining_error(
    weight: Float[Tensor, "out in"],
    method: str,
    rank: int,
    generator: torch.Generator,
    **options: int,
) -> Float[Tensor, "out in"]:
    """W - (Q + s B A), float64, of a registered initializer that replaces the base; s = 1.

    Args:
        options: of the method, e.g. its number of iterations.
    """
    seed = generator.initial_seed()
    factors = init_factors(weight, {"name": method, **options}, r=rank, seed=seed)
    base = factors.replacement.base(weight, 1.0).double()
    return weight.double() - base - factors.lora_B.double() @ factors.lora_A.double()
