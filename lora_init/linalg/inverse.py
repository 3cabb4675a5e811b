"""The last eigenvectors of a positive semi-definite matrix: the first ones of its inverse.

A block Krylov space of the inverse needs solves, by a Cholesky factor or by what else the caller
has. Computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import choice
from lora_init.linalg.krylov import Subspace, block_width, leading_eigenspace, start_block
from lora_init.linalg.singular import Generators
from lora_init.linalg.thin import thin_qr

Solve = Callable[[Tensor], Tensor]


def last_by_inverse(
    solve: Solve,
    shape: tuple[int, ...],
    rank: int,
    generator: Generators | None,
    *,
    device: torch.device,
    start: Tensor | None = None,
) -> Float[Tensor, "*stack n rank"] | None:
    """The eigenvectors, the last of all first; None where their space does not come to rest.

    Args:
        solve: the matrix's inverse, applied to a block (*stack, n, k).
        shape: (*stack, n).
        start: columns to begin with.
    """
    found = _space(solve, shape, rank, generator, device=device, start=start)
    return None if found is None or not found.converged else _purified(solve, found)


def last_by_shifts(
    matrix: Float[Tensor, "*stack n n"],
    factor: Float[Tensor, "*stack n n"],
    rank: int,
    generator: Generators | None,
    *,
    rounding: Float[Tensor, "*stack"] | None = None,
) -> Float[Tensor, "*stack n rank"] | None:
    """The same by a Cholesky factor, and where that converges slowly, by one of matrix - shift.

    The smallest values of a flat spectrum differ by little, and so do their inverses. A first space
    knows the very smallest to within its residual; moved so that it comes near zero, the others'
    inverses lie far apart.

    Args:
        matrix: overwritten.
        factor: of `matrix`.
        rounding: values below it are zero as far as can be told: none of their directions is better
            than another, and none would come to rest.
    """
    solve = solver(factor)
    shape, device = matrix.shape[:-1], matrix.device
    rounds = choice.ROUNDS_BEFORE_SHIFT
    found = _space(solve, shape, rank, generator, device=device, rounds=rounds)
    if found is None:
        return None
    null = rounding is not None and bool((found.values[..., -1] * rounding > 1).all())
    if found.converged or null:
        return _purified(solve, found)
    # The largest inverse is within its residual of the first one here, which bounds the smallest
    # value from below; below that by as much as the wanted ones differ, all their inverses count.
    smallest = 1 / (found.values[..., 0] + found.residuals[..., 0])
    spread = 1 / found.values[..., -1] - 1 / found.values[..., 0]
    shift = (smallest - spread / 2).clamp_min(0)
    matrix.diagonal(dim1=-2, dim2=-1).sub_(shift[..., None])
    moved = cholesky(matrix)
    if moved is None:
        return None
    return last_by_inverse(
        solver(moved), shape, rank, generator, device=device, start=found.vectors
    )


def cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor; None where the matrix is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if bool((failed != 0).any()) else factor


def solver(factor: Float[Tensor, "*stack n n"]) -> Solve:
    """``(L L^T)^-1``, of a lower factor L.

    On a CPU by two triangular solves, to the last bit what `torch.cholesky_solve` gives, which
    copies the factor every time. On an accelerator a solve waits for each row in turn, a product
    does not: there the factor is inverted once.
    """
    if factor.device.type not in choice.LAPACK_DEVICES:
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        return lambda block: inverse.mT @ (inverse @ block)

    def solve(block: Tensor) -> Tensor:
        block = torch.linalg.solve_triangular(factor, block, upper=False)
        return torch.linalg.solve_triangular(factor.mT, block, upper=True)

    return solve


def _space(
    solve: Solve,
    shape: tuple[int, ...],
    rank: int,
    generator: Generators | None,
    *,
    device: torch.device,
    start: Tensor | None = None,
    rounds: int = choice.KRYLOV_ROUNDS,
) -> Subspace | None:
    block = start_block(
        shape, block_width(rank, shape[-1]), generator, start,
        dtype=torch.float64, device=device,
    )  # fmt: skip
    products = choice.INVERSE_PRODUCTS if shape[-1] >= choice.INVERSE_DIMENSION else 0
    return leading_eigenspace(
        solve, block, rank,
        each=True, warm=start is not None, rounds=rounds, products=products,
    )  # fmt: skip


def _purified(solve: Solve, found: Subspace) -> Tensor:
    """The vectors after one more solve, orthonormal.

    What little of the first vectors the stopping rule leaves in them, the matrix would multiply by
    values that are larger by many decades; the solve divides it by as much.
    """
    return thin_qr(solve(found.vectors))[0]
