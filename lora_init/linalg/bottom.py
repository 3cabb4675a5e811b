"""The smallest singular triplets of a matrix, a stack, or a product of two matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import dense
from lora_init.linalg.decomposition import (
    Decomposition,
    fix_signs,
    flipped,
    from_right,
    joined,
    members_of,
    relative,
    swapped,
)
from lora_init.linalg.draws import Generators
from lora_init.linalg.eigen import cholesky, last_by_inverse, last_by_shifts, solver
from lora_init.linalg.gram import gram_matrix
from lora_init.linalg.krylov import start_block
from lora_init.linalg.operators import Operator, check
from lora_init.linalg.precision import full_precision
from lora_init.linalg.thin import thin_qr

METHODS = ("auto", "exact", "gram", "inverse")
PARTIAL_LAST = 768
"""LAPACK's partial eigensolver beats a Krylov space of an inverse up to this size."""
RESOLUTION = 1e-12
"""The smallest eigenvalue of a Gram matrix that float64 resolves, as a share of the largest."""
SINGULAR = 1e-14
"""A matrix counts as singular if a pivot is below this share of s_1."""


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

    The thin SVD has min(m, n) triplets, so the Gram matrix of the smaller side is used. The
    smallest eigenvectors of the larger one span W's null space, which no thin SVD contains.

    Methods:
        - "exact": LAPACK's SVD, cut.
        - "gram": a dense eigensolver on the Gram matrix. Its eigenvalues are squares, so a value
          below 1e-6 s_1 is lost to rounding.
        - "inverse": the largest eigenvalues of the Gram matrix's inverse. A block Krylov space
          finds them by solves with a Cholesky factor, shifted towards the smallest value if the
          others are near to it. For a product ``W R`` with square R and no more columns than rows,
          the solves use the factors of R and ``W^T W``, whose condition is far better than the
          product's. If squares are too ill-conditioned, a dense solver inverts the triangle of a
          QR decomposition.
        - "auto": "gram" for small matrices, else "inverse", and "exact" for singular matrices.

    Args:
        matrix: as for `top_singular`.
        rank: 1 to min(m, n).
        generator: as for `top_singular`.

    Returns:
        A `Decomposition` in the matrix's dtype (float32 for 16 bits), signs fixed by `fix_signs`.

    Raises:
        ValueError: as `top_singular`.
    """
    check(matrix, rank, narrow=True)
    if method not in METHODS:
        raise ValueError(
            f"method={method!r} is not supported: must be one of {', '.join(METHODS)}."
        )
    given = isinstance(matrix, Operator)
    exact = matrix.widened() if given else Operator.dense(matrix.double())
    wide = exact.shape[-2] < exact.shape[-1]
    if exact.factors is None or wide:
        whole = exact.to_dense() if given or exact.matrix is None else exact.matrix
        exact = Operator.dense(whole.mT if wide else whole)
    found = _decomposed(exact, rank, method, generator)
    found = flipped(swapped(found) if wide else found)
    return found.to(torch.promote_types(matrix.dtype, torch.float32))


def _decomposed(
    tall: Operator, rank: int, method: str, generator: Generators | None
) -> Decomposition:
    """Return triplets of a map with no more columns than rows, in float64, values descending."""
    largest = _largest_value(tall)
    for attempt in _attempts(tall) if method == "auto" else (method,):
        right = None
        if attempt == "gram":
            values, vectors = dense.eigenpairs(gram_matrix(tall.to_dense(), torch.float64), 0, rank)
            resolved = bool((values[..., 0] > RESOLUTION * largest.square()).all())
            right = vectors if resolved else None
        elif attempt == "inverse":
            right = _by_inverses(tall, rank, largest, generator)
        if right is not None:
            # One-sided: a product with W^T would amplify the small part of v_1 in the vectors.
            return from_right(tall, right, attempt, largest=largest)
    if len(tall.shape) > 2:  # an SVD only of the members that need it
        members = tall.to_dense() if tall.members is None else tall.members()
        parts = [
            _decomposed(one if isinstance(one, Operator) else Operator.dense(one), rank, method, g)
            for one, g, _ in members_of(members, generator)
        ]
        return joined(parts, tall.shape[:-2])
    return _last_of_svd(tall.to_dense(), rank)


def _attempts(tall: Operator) -> tuple[str, ...]:
    """Return the methods to try in turn. Each reports whether it was precise enough."""
    n = tall.shape[-1]
    if n <= dense.DENSE_DIMENSION:
        return ("gram",)
    # A product's spectrum falls as fast as those of both factors together: too fast for squares.
    if tall.factors is None and n <= PARTIAL_LAST and dense.has_partial_solver(tall):
        return ("gram", "inverse")
    return ("inverse",)


def _last_of_svd(matrix: Tensor, rank: int) -> Decomposition:
    """Return LAPACK's own triplets: a singular matrix's left ones are not images of the right."""
    left, values, right = dense.svd(matrix)
    largest, values = values[..., 0], values[..., -rank:]
    left, right = fix_signs(left[..., -rank:], right[..., -rank:, :].mT)
    forward = matrix @ right - left * values[..., None, :]
    backward = matrix.mT @ left - right * values[..., None, :]
    worst = torch.maximum(*(torch.linalg.vector_norm(e, dim=-2) for e in (forward, backward)))
    residual = relative(worst.amax(-1), largest)
    return Decomposition(left, values, right, "exact", residual, largest)


def _largest_value(operator: Operator) -> Float[Tensor, "*stack"]:
    """Return s_1 within a factor of two: the scale of what is small, and of the residual."""
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
    """Return right vectors by the cheapest inverse that is precise enough, or None."""
    *stack, _, n = tall.shape
    solve = None if tall.factors is None else _product_inverse(*tall.factors)
    if solve is not None:
        found = last_by_inverse(solve, (*stack, n), rank, generator, device=tall.device)
        if found is not None:
            return found
    whole = tall.to_dense()
    square = gram_matrix(whole, torch.float64)
    factor = cholesky(square)
    if factor is not None and _well_conditioned(factor, largest, RESOLUTION**0.5):
        return last_by_shifts(square, factor, rank, generator)
    triangle = torch.linalg.qr(whole, mode="r")[1]
    if not _well_conditioned(triangle, largest, SINGULAR):
        return None
    identity = torch.eye(n, dtype=triangle.dtype, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle, identity.expand_as(triangle), upper=True)
    values, vectors = dense.eigenpairs(gram_matrix(inverse.mT, torch.float64), n - rank, n)
    if not bool((values[..., 0] > RESOLUTION * values[..., -1]).all()):
        return None
    return thin_qr(solver(triangle.mT)(vectors.flip(-1)))[0]


def _product_inverse(first: Tensor, second: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return ``(W R)^-1 (W R)^-T = R^-1 (W^T W)^-1 R^-T``, or None if it is too ill-conditioned."""
    factor = cholesky(gram_matrix(first, torch.float64))
    pivots, permutation, failed = torch.linalg.lu_factor_ex(second)
    if factor is None or bool((failed != 0).any()):
        return None
    scale = torch.linalg.vector_norm(first, dim=(-2, -1))
    pivot = pivots.diagonal(dim1=-2, dim2=-1).abs()
    singular = (pivot.amin(-1) <= SINGULAR * pivot.amax(-1)).any()
    if singular or not _well_conditioned(factor, scale, RESOLUTION**0.5):
        return None
    inner = solver(factor)

    def solve(block: Tensor) -> Tensor:
        block = torch.linalg.lu_solve(pivots, permutation, block, adjoint=True)
        return torch.linalg.lu_solve(pivots, permutation, inner(block))

    return solve


def _well_conditioned(triangle: Tensor, largest: Tensor, resolution: float) -> bool:
    """Return whether every pivot is above `resolution` times s_1: a bound on the last value."""
    pivots = triangle.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
    return bool((pivots > resolution * largest).all())
