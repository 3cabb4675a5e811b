"""The smallest singular triplets of a matrix, a stack, or a product of two matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import dense as choice
from lora_init.linalg import dense as small
from lora_init.linalg.decomposition import (
    Decomposition,
    fix_signs,
    flipped,
    from_right,
    one_by_one,
    relative,
    swapped,
)
from lora_init.linalg.dense import eigenpairs, gram, has_partial_solver
from lora_init.linalg.eigen import cholesky, last_by_inverse, last_by_shifts, solver
from lora_init.linalg.krylov import start_block
from lora_init.linalg.operators import Operator, check
from lora_init.linalg.precision import full_precision
from lora_init.linalg.singular import Generators
from lora_init.linalg.thin import thin_qr

METHODS = ("auto", "exact", "gram", "inverse")


@torch.no_grad()
@full_precision()
def bottom_singular(
    matrix: Float[Tensor, "*stack m n"] | Operator,
    rank: int,
    *,
    method: str = "auto",
    generator: Generators | None = None,
) -> Decomposition:
    """Return the last `rank` triplets of the thin SVD, values ascending, computed in float64.

    The thin SVD has min(m, n) triplets, so the Gram matrix of the smaller side is the one to use:
    the smallest eigenvectors of the larger one span W's null space, which no thin SVD contains.

    Methods:
        - "exact": LAPACK's SVD, cut.
        - "gram": a dense eigensolver on the Gram matrix. Eigenvalues are squares: a value below
          1e-6 s_1 is lost in them to rounding.
        - "inverse": a block Krylov space of the Gram matrix's inverse, whose largest eigenvalues
          are wanted, by triangular solves with a Cholesky factor, shifted towards the smallest
          value where the others are near to it; of a product ``W R`` with square R and no more
          columns than rows, by solves with the factors of R and of ``W^T W``, whose condition is
          far from the product's; and where squares are too ill-conditioned, with the triangle of a
          QR decomposition.
        - "auto": "gram" for small matrices, else "inverse", also where squares lose the smallest
          values; for singular ones "exact".

    Args:
        matrix: as of `top_singular`.
        rank: 1 to min(m, n).
        generator: as `top_singular`.

    Returns:
        A `Decomposition` in the matrix's dtype (float32 for 16 bits), signs fixed by `fix_signs`.

    Raises:
        ValueError: as `top_singular`.
    """
    check(matrix, rank, narrow=True)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed are {', '.join(METHODS)}.")
    given = isinstance(matrix, Operator)
    exact = matrix.widened() if given else Operator.dense(matrix.double())
    wide = exact.shape[-2] < exact.shape[-1]
    if exact.factors is None or wide:
        dense = exact.to_dense() if given else matrix.double()
        exact = Operator.dense(dense.mT if wide else dense)
    found = _decomposed(exact, rank, method, generator)
    found = flipped(swapped(found) if wide else found)
    return found.to(torch.promote_types(matrix.dtype, torch.float32))


def _decomposed(
    tall: Operator, rank: int, method: str, generator: Generators | None
) -> Decomposition:
    """Triplets of a map with no more columns than rows, in float64, values descending."""
    largest = _largest_value(tall)
    for attempt in _attempts(tall) if method == "auto" else (method,):
        right = None
        if attempt == "gram":
            right = _by_squares(tall, rank, largest)
        elif attempt == "inverse":
            right = _by_inverses(tall, rank, largest, generator)
        if right is not None:
            # One-sided: a product with W^T would amplify what little of v_1 the vectors contain.
            return from_right(tall, right, attempt, largest=largest)
    if len(tall.shape) > 2:  # an SVD only of the members that need it

        def alone(
            matrix: Tensor | Operator, *, generator: Generators | None, start: None
        ) -> Decomposition:
            one = matrix if isinstance(matrix, Operator) else Operator.dense(matrix)
            return _decomposed(one, rank, method, generator)

        members = tall.to_dense() if tall.members is None else tall.members()
        return one_by_one(alone, members, generator)
    dense = tall.to_dense()
    left, values, right = small.svd(dense)
    return _last_of(dense, left, values, right.mT, rank)


def _attempts(tall: Operator) -> tuple[str, ...]:
    """What is tried in turn, where each says itself whether it was precise enough."""
    n = tall.shape[-1]
    if n <= choice.DENSE_DIMENSION:
        return ("gram",)
    # A product's spectrum falls like both factors' together: squares would hardly ever do.
    if tall.factors is None and n <= choice.PARTIAL_LAST and has_partial_solver(tall):
        return ("gram", "inverse")
    return ("inverse",)


def _by_squares(tall: Operator, rank: int, largest: Tensor) -> Tensor | None:
    """Right vectors by a dense solver, or None where rounding would be as large as the values."""
    values, vectors = eigenpairs(gram(tall.to_dense(), torch.float64), 0, rank)
    resolved = bool((values[..., 0] > choice.BOTTOM_RESOLUTION * largest.square()).all())
    return vectors if resolved else None


def _last_of(
    dense: Tensor, left: Tensor, values: Tensor, right: Tensor, rank: int
) -> Decomposition:
    """LAPACK's own last triplets: of a singular matrix the left ones are no images of the right."""
    largest, values = values[..., 0], values[..., -rank:]
    left, right = fix_signs(left[..., -rank:], right[..., -rank:])
    forward = dense @ right - left * values[..., None, :]
    backward = dense.mT @ left - right * values[..., None, :]
    worst = torch.maximum(*(torch.linalg.vector_norm(e, dim=-2) for e in (forward, backward)))
    residual = relative(worst.amax(-1), largest)
    return Decomposition(left, values, right, "exact", residual, largest)


def _largest_value(operator: Operator) -> Float[Tensor, "*stack"]:
    """s_1 to within a factor of two: it decides what counts as small, and scales the residual."""
    *stack, _, n = operator.shape
    block = start_block((*stack, n), 1, None, None, dtype=operator.dtype, device=operator.device)
    for _ in range(4):
        image = operator.matmul(block)
        block = operator.rmatmul(image)
        norm = torch.linalg.vector_norm(block, dim=-2, keepdim=True)
        block = block / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.linalg.vector_norm(operator.matmul(block), dim=(-2, -1))


def _by_inverses(
    tall: Operator, rank: int, largest: Tensor, generator: Generators | None
) -> Tensor | None:
    """Right vectors by the cheapest inverse that is precise enough, or None."""
    solve = None if tall.factors is None else _product_inverse(*tall.factors)
    if solve is not None and (found := _by_space(solve, tall, rank, generator)) is not None:
        return found
    dense = tall.to_dense()
    square = gram(dense, torch.float64)
    factor = cholesky(square)
    if factor is not None and _well_conditioned(factor, largest, choice.BOTTOM_RESOLUTION**0.5):
        return last_by_shifts(square, factor, rank, generator)
    triangle = torch.linalg.qr(dense, mode="r")[1]
    if not _well_conditioned(triangle, largest, choice.PIVOT_RESOLUTION):
        return None
    if solve is None:  # else a space of the same inverse has just not converged
        found = _by_space(_triangle_inverse(triangle), tall, rank, generator)
    return _by_dense_inverse(triangle, rank) if found is None else found


def _by_space(
    solve: Callable[[Tensor], Tensor], tall: Operator, rank: int, generator: Generators | None
) -> Tensor | None:
    *stack, _, n = tall.shape
    return last_by_inverse(solve, (*stack, n), rank, generator, device=tall.device)


def _product_inverse(first: Tensor, second: Tensor) -> Callable[[Tensor], Tensor] | None:
    """``(W R)^-1 (W R)^-T = R^-1 (W^T W)^-1 R^-T``."""
    factor = cholesky(gram(first, torch.float64))
    pivots, permutation, failed = torch.linalg.lu_factor_ex(second)
    if factor is None or bool((failed != 0).any()):
        return None
    scale = torch.linalg.vector_norm(first, dim=(-2, -1))
    pivot = pivots.diagonal(dim1=-2, dim2=-1).abs()
    singular = (pivot.amin(-1) <= choice.PIVOT_RESOLUTION * pivot.amax(-1)).any()
    if singular or not _well_conditioned(factor, scale, choice.BOTTOM_RESOLUTION**0.5):
        return None

    inner = solver(factor)

    def solve(block: Tensor) -> Tensor:
        block = torch.linalg.lu_solve(pivots, permutation, block, adjoint=True)
        block = inner(block)
        return torch.linalg.lu_solve(pivots, permutation, block)

    return solve


def _triangle_inverse(triangle: Tensor) -> Callable[[Tensor], Tensor]:
    def solve(block: Tensor) -> Tensor:
        block = torch.linalg.solve_triangular(triangle.mT, block, upper=False)
        return torch.linalg.solve_triangular(triangle, block, upper=True)

    return solve


def _by_dense_inverse(triangle: Tensor, rank: int) -> Tensor | None:
    """Right vectors by a dense solver on ``R^-1 R^-T``, whose largest eigenvalues are wanted.

    For spectra so flat that no space of the inverse converges; a third of an SVD's time or less.
    None where the wanted values lie too far apart for squares.
    """
    identity = torch.eye(triangle.shape[-1], dtype=triangle.dtype, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle, identity.expand_as(triangle), upper=True)
    n = triangle.shape[-1]
    values, vectors = eigenpairs(gram(inverse.mT, torch.float64), n - rank, n)
    if not bool((values[..., 0] > choice.BOTTOM_RESOLUTION * values[..., -1]).all()):
        return None
    return thin_qr(_triangle_inverse(triangle)(vectors.flip(-1)))[0]


def _well_conditioned(triangle: Tensor, largest: Tensor, resolution: float) -> bool:
    """Whether every pivot is above `resolution` times s_1: a bound on the smallest value."""
    pivots = triangle.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
    return bool((pivots > resolution * largest).all())
