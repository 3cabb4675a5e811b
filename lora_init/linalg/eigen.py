"""The first or last eigenpairs of a positive semi-definite matrix, such as a second moment.

The last eigenvectors are the first ones of the inverse, whose Krylov space needs solves with a
Cholesky factor instead of products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import dense
from lora_init.linalg.decomposition import fix_signs, members_of
from lora_init.linalg.draws import Generators
from lora_init.linalg.krylov import ROUNDS, Subspace, block_width, leading_eigenspace, start_block
from lora_init.linalg.operators import check
from lora_init.linalg.precision import full_precision
from lora_init.linalg.thin import thin_qr

Solve = Callable[[Tensor], Tensor]

TOP_METHODS = ("auto", "exact", "krylov")
BOTTOM_METHODS = ("auto", "exact", "inverse")
# LAPACK's partial eigensolver beats a Krylov space up to these sizes.
PARTIAL_FIRST = 640
PARTIAL_LAST = 2048
FIRST_ROUNDS = 10
"""Spectra with leading directions converge in fewer rounds; others, such as noise, in many more."""
ROUNDS_BEFORE_SHIFT = 3
"""After these rounds with an inverse, a shift is worth its Cholesky decomposition."""
# From this size a solve costs more than the eigenproblem of a basis of so many products.
INVERSE_DIMENSION = 2048
INVERSE_PRODUCTS = 32


@torch.no_grad()
@full_precision()
def top_eigen(
    matrix: Float[Tensor, "*stack n n"],
    rank: int,
    *,
    method: str = "auto",
    generator: Generators | None = None,
) -> tuple[Float[Tensor, "*stack rank"], Float[Tensor, "*stack n rank"]]:
    """Return the `rank` largest eigenpairs of a symmetric PSD matrix, eigenvalues descending.

    They are computed in float64: the spectrum of a second moment falls by more decades than float32
    has digits. Methods: "exact", a (partial) dense eigendecomposition; "krylov", a block Krylov
    space that ends when every vector has converged; "auto", by size and rank.

    Args:
        matrix: (n, n), symmetric positive semi-definite, float32 or float64; or a stack of such.
        rank: 1 to n.
        generator: as for `top_singular`.

    Returns:
        Values (*stack, rank) and vectors (*stack, n, rank) in the matrix's dtype. The entry of
        largest magnitude of each vector is positive. Eigenvalues that rounding made negative are 0.

    Raises:
        ValueError: `matrix` is not a square float matrix, or an argument is outside these values.
    """
    _check(matrix, rank, method, TOP_METHODS)
    n = matrix.shape[-1]
    exact = matrix.double()
    limit = PARTIAL_FIRST if dense.has_partial_solver(exact) else dense.DENSE_DIMENSION
    found = None
    if method == "krylov" or (method == "auto" and _is_large(n, rank, limit)):
        shape, width = exact.shape[:-1], block_width(rank, n)
        block = start_block(shape, width, generator, None, dtype=exact.dtype, device=exact.device)
        space = leading_eigenspace(
            lambda block: exact @ block, block, rank, each=True, rounds=FIRST_ROUNDS
        )
        if space is not None and space.converged:
            found = space.values, thin_qr(space.vectors)[0]
        elif space is not None and exact.ndim > 2:  # a dense solver only where needed
            pairs = [
                top_eigen(one, rank, method=method, generator=draws)
                for one, draws, _ in members_of(matrix, generator)
            ]
            parts = (torch.stack(part) for part in zip(*pairs, strict=True))
            values, vectors = (part.reshape(*shape[:-1], *part.shape[1:]) for part in parts)
            return values, vectors
    if found is None:
        values, vectors = dense.eigenpairs(exact, n - rank, n)
        found = values.flip(-1), vectors.flip(-1)
    return _finished(*found, matrix.dtype)


@torch.no_grad()
@full_precision()
def bottom_eigen(
    matrix: Float[Tensor, "*stack n n"],
    rank: int,
    *,
    method: str = "auto",
    generator: Generators | None = None,
) -> tuple[Float[Tensor, "*stack rank"], Float[Tensor, "*stack n rank"]]:
    """Return the `rank` smallest eigenpairs of a symmetric PSD matrix, eigenvalues ascending.

    If the null space is larger than `rank`, orthonormal directions of it are returned. Methods:
    "exact", as for `top_eigen`; "inverse", a block Krylov space of the inverse, with the diagonal
    lifted by the rounding of the largest eigenvalue, which changes no eigenvector; "auto", by size
    and rank.

    Args:
        matrix, rank, generator: as for `top_eigen`.

    Returns:
        As `top_eigen`.

    Raises:
        ValueError: as `top_eigen`.
    """
    _check(matrix, rank, method, BOTTOM_METHODS)
    n = matrix.shape[-1]
    exact = matrix.double()
    limit = PARTIAL_LAST if dense.has_partial_solver(exact) else dense.DENSE_DIMENSION
    found = None
    if method == "inverse" or (method == "auto" and _is_large(n, rank, limit)):
        found = _last_of_lifted(exact, rank, generator)
    if found is None:
        found = dense.eigenpairs(exact, 0, rank)
    return _finished(*found, matrix.dtype)


def last_by_inverse(
    solve: Solve,
    shape: tuple[int, ...],
    rank: int,
    generator: Generators | None,
    *,
    device: torch.device,
    start: Tensor | None = None,
) -> Float[Tensor, "*stack n rank"] | None:
    """Return the last eigenvectors, the very last first, or None if their space does not converge.

    Args:
        solve: applies the matrix's inverse to a block (*stack, n, k).
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
    """Return the last eigenvectors by a Cholesky factor, or by that of matrix - shift.

    The smallest values of a flat spectrum differ by little, and so do their inverses. A first space
    bounds the very smallest value. A shift to just below it spreads the inverses far apart.

    Args:
        matrix: overwritten.
        factor: of `matrix`.
        rounding: smaller values count as zero. Their directions are equally good, and need not
            converge.
    """
    solve = solver(factor)
    shape, device = matrix.shape[:-1], matrix.device
    found = _space(solve, shape, rank, generator, device=device, rounds=ROUNDS_BEFORE_SHIFT)
    if found is None:
        return None
    null = rounding is not None and bool((found.values[..., -1] * rounding > 1).all())
    if found.converged or null:
        return _purified(solve, found)
    # The largest inverse is within its residual of the first one here, which bounds the smallest
    # value from below. Half the spread of the wanted values below that, all their inverses count.
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
    """Return the lower factor, or None if the matrix is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if bool((failed != 0).any()) else factor


def solver(factor: Float[Tensor, "*stack n n"]) -> Solve:
    """Return the map ``(L L^T)^-1`` of a lower factor L.

    A CPU uses two triangular solves; `torch.cholesky_solve` would copy the factor every time. On an
    accelerator a solve waits for each row in turn, so the factor is inverted once.
    """
    if factor.device.type not in dense.LAPACK_DEVICES:
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
    rounds: int = ROUNDS,
) -> Subspace | None:
    width, products = block_width(rank, shape[-1]), 0
    if shape[-1] >= INVERSE_DIMENSION:
        products = INVERSE_PRODUCTS
    block = start_block(shape, width, generator, start, dtype=torch.float64, device=device)
    warm = start is not None
    return leading_eigenspace(
        solve, block, rank, each=True, warm=warm, rounds=rounds, products=products
    )


def _purified(solve: Solve, found: Subspace) -> Tensor:
    """Return the vectors after one more solve, orthonormal.

    The stopping rule leaves a small part of the matrix's first vectors in them, which the matrix
    would amplify by decades. The solve reduces it by as much.
    """
    return thin_qr(solve(found.vectors))[0]


def _last_of_lifted(
    exact: Tensor, rank: int, generator: Generators | None
) -> tuple[Tensor, Tensor] | None:
    """Return the last eigenpairs by the inverse, or None if it fails or does not converge."""
    trace = exact.diagonal(dim1=-2, dim2=-1).sum(-1)
    rounding = exact.shape[-1] * torch.finfo(exact.dtype).eps * trace
    lifted = exact.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(rounding[..., None])
    factor = cholesky(lifted)
    if factor is None:
        return None
    basis = last_by_shifts(lifted, factor, rank, generator, rounding=2 * rounding)
    if basis is None:
        return None
    values, turns = dense.eigh(basis.mT @ exact @ basis)
    return values, basis @ turns


def _is_large(n: int, rank: int, limit: int) -> bool:
    return n > limit and rank <= dense.DENSE_SHARE * n


def _finished(values: Tensor, vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    vectors = fix_signs(vectors, vectors)[0]
    return values.clamp_min(0).to(dtype), vectors.to(dtype)


def _check(matrix: Tensor, rank: int, method: str, methods: tuple[str, ...]) -> None:
    check(matrix, rank)
    if matrix.shape[-2] != matrix.shape[-1]:
        raise ValueError(
            f"matrix with shape {tuple(matrix.shape)} is not supported: must be square."
        )
    if method not in methods:
        raise ValueError(
            f"method={method!r} is not supported: must be one of {', '.join(methods)}."
        )
