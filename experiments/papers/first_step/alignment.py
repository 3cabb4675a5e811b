"""How closely an adapter's first step follows the gradient of the whole weight. Pure maths.

With G = dL/dW (m × n) and the factors B0 (m × r), A0 (r × n), one step of SGD at rate η changes

    ΔB = -η s G A0ᵀ,   ΔA = -η s B0ᵀ G,   so that   s(ΔB A0 + B0 ΔA) = -η s² U,
    U = G A0ᵀ A0 + B0 B0ᵀ G,

up to η², where full fine-tuning goes along -G. Adam's first step takes the signs of both gradients,
U = sign(G A0ᵀ) A0 + B0 sign(B0ᵀ G). How far U is from G at the best length c of the step,

    min_c ‖c U - G‖ / ‖G‖ = sqrt(1 - <U, G>² / (‖U‖² ‖G‖²)),

is the sine of the angle between them: 0 follows G, 1 is perpendicular to it. (c belongs to U: with
it at G, ‖U - c G‖ / ‖c G‖ at its least squares is the tangent, which orders the same.) U has rank
2r at most, so that no start is nearer than the best approximation of that rank,

    sqrt(sum over i > 2r of σ_i²) / ‖G‖,    σ the singular values of G (Eckart and Young).

U is never formed: it is a product of an m × 2r and a 2r × n matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Product = tuple[Float[Tensor, "out inner"], Float[Tensor, "inner in"]]
"""Two matrices that stand for their product."""


def sgd_step(
    gradient: Float[Tensor, "out in"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    frozen: Sequence[str] = (),
) -> Product:
    """U of one step of SGD, in float64; a factor among `frozen` does not move."""
    gradient, lora_A, lora_B = gradient.double(), lora_A.double(), lora_B.double()
    return _step(gradient @ lora_A.T, lora_B.T @ gradient, lora_A, lora_B, frozen)


def adam_step(
    gradient: Float[Tensor, "out in"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    frozen: Sequence[str] = (),
) -> Product:
    """U of Adam's first step, whose size is the rate in every entry that has a gradient."""
    gradient, lora_A, lora_B = gradient.double(), lora_A.double(), lora_B.double()
    signs = (gradient @ lora_A.T).sign(), (lora_B.T @ gradient).sign()
    return _step(*signs, lora_A, lora_B, frozen)


def _step(
    move_B: Tensor, move_A: Tensor, lora_A: Tensor, lora_B: Tensor, frozen: Sequence[str]
) -> Product:
    left, right = [], []
    if "lora_B" not in frozen:
        left, right = [move_B], [lora_A]
    if "lora_A" not in frozen:
        left, right = [*left, lora_B], [*right, move_A]
    return torch.cat(left, dim=1), torch.cat(right)


def relative_error(step: Product, wanted: Float[Tensor, "out in"]) -> float:
    """min over c ≥ 0 of ‖c U - G‖ / ‖G‖; 1 where U is zero, or points away from G.

    Raises:
        ValueError: there is no gradient to follow.
    """
    left, right = (factor.double() for factor in step)
    wanted = wanted.double()
    norm = float(torch.linalg.vector_norm(wanted)) ** 2
    if norm == 0:
        raise ValueError("the gradient is zero: no step follows it")
    square = float(((left.T @ left) * (right @ right.T)).sum())
    product = float(((left.T @ wanted) * right).sum())
    if square <= 0 or product <= 0:
        return 1.0
    return max(0.0, 1 - product**2 / (square * norm)) ** 0.5


def rank_bounds(gradient: Float[Tensor, "out in"], ranks: Sequence[int]) -> list[float]:
    """The relative error of the best approximation of each rank."""
    wide = gradient.double() if gradient.shape[0] <= gradient.shape[1] else gradient.double().T
    energies = torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0)  # ascending
    total = energies.sum()
    tails = [energies[: max(0, len(energies) - rank)].sum() for rank in ranks]
    return [float((tail / total).sqrt()) for tail in tails]
