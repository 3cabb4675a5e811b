"""The first or last eigenpairs of a positive semi-definite matrix, such as a second moment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import dense as choice
from lora_init.linalg import dense as small
from lora_init.linalg.decomposition import fix_signs
from lora_init.linalg.dense import eigenpairs, has_partial_solver
from lora_init.linalg.krylov import Subspace, block_width, leading_eigenspace, start_block
from lora_init.linalg.operators import check
from lora_init.linalg.precision import full_precision
from lora_init.linalg.singular import Generators
from lora_init.linalg.thin import thin_qr

TOP_METHODS = ("auto", "exact", "krylov")
BOTTOM_METHODS = ("auto", "exact", "inverse")


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

    Computed in float64: the spectrum of a second moment falls by more decades than float32 has
    digits. Methods: "exact", a (partial) dense eigendecomposition; "krylov", a block Krylov space
    that ends when every single value is at rest (see `krylov`); "auto", by size and rank.

    Args:
        matrix: (n, n), symmetric positive semi-definite, float32 or float64; or a stack of such.
        rank: 1 to n.
        generator: as `top_singular`.

    Returns:
        Values (*stack, rank) and vectors (*stack, n, rank) in the matrix's dtype; the entry of
        largest magnitude of each vector is positive. Eigenvalues that rounding made negative are
        returned as 0.

    Raises:
        ValueError: `matrix` is not a square float matrix, or an argument is not allowed.
    """
    _check(matrix, rank, method, "top_eigen", TOP_METHODS)
    n = matrix.shape[-1]
    exact = matrix.double()
    dense = choice.PARTIAL_FIRST if has_partial_solver(exact) else choice.DENSE_DIMENSION
    small = n <= dense or rank > choice.DENSE_SHARE * n
    values = None
    iterates = method == "krylov" or (method == "auto" and not small)
    if iterates:
        block = start_block(
            exact.shape[:-1], block_width(rank, n), generator, None,
            dtype=exact.dtype, device=exact.device,
        )  # fmt: skip
        found = leading_eigenspace(
            lambda block: exact @ block, block, rank, each=True, foresee=True
        )
        if found is not None and found.converged:
            values, vectors = found.values, thin_qr(found.vectors)[0]
        elif found is not None and exact.ndim > 2:  # a dense solver only where it is needed
            return _each(partial(top_eigen, rank=rank, method=method), matrix, generator)
    if values is None:
        values, vectors = eigenpairs(exact, n - rank, n)
        values, vectors = values.flip(-1), vectors.flip(-1)
    vectors = fix_signs(vectors, vectors)[0]
    return values.clamp_min(0).to(matrix.dtype), vectors.to(matrix.dtype)


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

    Of a matrix whose null space is larger than `rank`, orthonormal directions of it. Methods:
    "exact", as of `top_eigen`; "inverse", a block Krylov space of the inverse by solves with a
    Cholesky factor, the diagonal lifted by the rounding of the largest eigenvalue, which moves no
    eigenvector; "auto", by size and rank.

    Args:
        matrix, rank, generator: as of `top_eigen`.

    Returns:
        As `top_eigen`.

    Raises:
        ValueError: as `top_eigen`.
    """
    _check(matrix, rank, method, "bottom_eigen", BOTTOM_METHODS)
    n = matrix.shape[-1]
    exact = matrix.double()
    dense = choice.PARTIAL_LAST_PAIRS if has_partial_solver(exact) else choice.DENSE_DIMENSION
    small = n <= dense or rank > choice.DENSE_SHARE * n
    found = None
    if method == "inverse" or (method == "auto" and not small):
        found = _by_inverse(exact, rank, generator)
    values, vectors = eigenpairs(exact, 0, rank) if found is None else found
    vectors = fix_signs(vectors, vectors)[0]
    return values.clamp_min(0).to(matrix.dtype), vectors.to(matrix.dtype)


def _each(
    decompose: Callable[..., tuple[Tensor, Tensor]], stack: Tensor, generator: Generators | None
) -> tuple[Tensor, Tensor]:
    """`decompose` of every matrix of a stack by itself."""
    members = stack.reshape(-1, *stack.shape[-2:])
    single = generator is None or isinstance(generator, torch.Generator)
    generators = [generator] * len(members) if single else generator
    pairs = [
        decompose(matrix, generator=draws)
        for matrix, draws in zip(members, generators, strict=True)
    ]
    values, vectors = (torch.stack(part) for part in zip(*pairs, strict=True))
    leading = stack.shape[:-2]
    return tuple(part.reshape(*leading, *part.shape[1:]) for part in (values, vectors))


def _by_inverse(
    exact: Tensor, rank: int, generator: Generators | None
) -> tuple[Tensor, Tensor] | None:
    """None where the matrix has no inverse to speak of, or its space does not come to rest."""
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
    values, turns = small.eigh(basis.mT @ exact @ basis)
    return values, basis @ turns


def _check(matrix: Tensor, rank: int, method: str, name: str, methods: tuple[str, ...]) -> None:
    check(matrix, rank)
    if matrix.shape[-2] != matrix.shape[-1]:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; {name} needs a square one.")
    if method not in methods:
        raise ValueError(f"method={method!r} is unknown; allowed are {', '.join(methods)}.")


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
