"""The largest singular triplets of a matrix, a stack or an operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import dense
from lora_init.linalg.decomposition import Decomposition, from_right, joined, members_of, swapped
from lora_init.linalg.draws import Generators
from lora_init.linalg.gram import gram_matrix
from lora_init.linalg.krylov import Subspace, block_width, leading_eigenspace, start_block
from lora_init.linalg.matrix import frobenius_norm
from lora_init.linalg.mixed_products import has_mixed_products, is_narrow
from lora_init.linalg.operators import Operator, check
from lora_init.linalg.powers import by_iterations, by_powers
from lora_init.linalg.precision import full_precision
from lora_init.linalg.thin import thin_qr

QUALITY = ("exact", "gram", "gram-krylov", "krylov")
"""The methods that keep the promised quality."""
ITERATIONS = ("powers", "subspace")
"""The methods that take `niter`."""
METHODS = ("auto", *QUALITY, *ITERATIONS)

# The share of ‖W‖² outside the triplets below which this precision cannot tell an excess of 1e-4.
# More careful arithmetic takes over there.
SQUARED_RESOLUTION = {torch.float32: 1e-3, torch.float64: 2e-8}
PRODUCT_RESOLUTION = {torch.float32: 3e-7, torch.float64: 1e-9}


@torch.no_grad()
@full_precision()
def top_singular(
    matrix: Float[Tensor, "*stack m n"] | Operator,
    rank: int,
    *,
    method: str = "auto",
    niter: int | None = None,
    generator: Generators | None = None,
    start: Float[Tensor, "*stack n k"] | None = None,
    tolerance: float | None = None,
) -> Decomposition:
    """Return the `rank` largest singular triplets, values descending.

    Methods:
        - "exact": LAPACK's SVD, cut.
        - "gram": a dense eigensolver on the smaller of ``W W^T`` and ``W^T W``, in float64.
        - "gram-krylov": a block Krylov space of the same matrix, in W's dtype.
        - "krylov": a block Krylov space by products with W and its transpose; nothing is squared.
        - "powers": at least as good as `niter` power iterations, from fewer products (see
          `by_powers`).
        - "subspace": exactly `niter` power iterations, as `torch.svd_lowrank` (see
          `by_iterations`).
        - "auto": one of the first four by shape and rank; "powers" if `niter` is given.

    The first four keep the Frobenius error of the rank-r approximation within 1e-4 (relative)
    of the optimum, plus the rounding of the matrix's own dtype. If one cannot (no convergence,
    or a tail so small that squaring loses it), the next more careful method answers. The result's
    `method` names the method that did.

    Args:
        matrix: (m, n), float32, float64, bfloat16 or float16, any device; a stack of such; or an
            `Operator`. A 16-bit matrix is decomposed in float32.
        rank: 1 to min(m, n).
        niter: the number of power iterations, for "powers" and "subspace" only.
        generator: a CPU generator for the test block, or one for each matrix of a stack. Draws are
            made in float32 and then moved, so they do not depend on the device. None: a fixed seed.
        start: columns to begin with, such as the last `right` of a matrix that has changed little.
            Random columns are added; "exact" and "gram" ignore it.
        tolerance: a Krylov space ends when it expects to gain less than this share of the squared
            error. None: 5e-5.

    Returns:
        A `Decomposition` in the matrix's dtype (float32 for 16 bits), signs fixed by `fix_signs`.

    Raises:
        ValueError: `matrix` is not such a matrix, or an argument is outside the values above.

    References:
        Halko, Martinsson & Tropp 2011 (subspace iteration); Musco & Musco 2015 (block Krylov).
    """
    check(matrix, rank, narrow=True)
    _check_settings(matrix, method, niter, start)
    if isinstance(matrix, Tensor) and is_narrow(matrix.dtype) and not has_mixed_products(matrix):
        matrix = matrix.float()
    operator = matrix if isinstance(matrix, Operator) else Operator.dense(matrix)
    given = operator.dtype
    if niter is not None:
        spend = by_iterations if method == "subspace" else by_powers
        return spend(operator, rank, niter, generator, start)
    if method == "auto":
        method = _chosen(matrix, rank, warm=start is not None)
    if method == "krylov":
        found = _by_products(matrix, operator, rank, generator, start, tolerance)
        if found is not None:
            return found.to(given)
        members = matrix if isinstance(matrix, Tensor) else matrix.members and matrix.members()
        if members is not None and len(matrix.shape) > 2:  # a dense solver only where needed
            settings = {"method": method, "tolerance": tolerance}
            parts = [
                top_singular(one, rank, generator=draws, start=first, **settings)
                for one, draws, first in members_of(members, generator, start)
            ]
            return joined(parts, matrix.shape[:-2])
    # A product's spectrum falls as fast as those of both factors together: it needs float64.
    whole = matrix.widened().to_dense() if isinstance(matrix, Operator) else matrix.to(given)
    wide = whole.shape[-2] < whole.shape[-1]
    tall = whole.mT if wide else whole
    vectors = None
    if method == "gram-krylov":
        vectors = _by_gram_products(tall, rank, generator, None if wide else start, tolerance)
    if vectors is None and method != "exact":
        vectors, method = _by_squares(tall, rank), "gram"
    if vectors is None:
        right = dense.svd(whole)[2][..., :rank, :].mT
        return from_right(Operator.dense(whole), right, "exact").to(given)
    operator = Operator.dense(whole)
    found = from_right(operator.transpose if wide else operator, vectors, method).to(given)
    return swapped(found) if wide else found


def _check_settings(
    matrix: Tensor | Operator, method: str, niter: int | None, start: Tensor | None
) -> None:
    if method not in METHODS:
        raise ValueError(
            f"method={method!r} is not supported: must be one of {', '.join(METHODS)}."
        )
    if niter is not None and method in QUALITY:
        raise ValueError(
            f"niter={niter} is not supported with method={method!r}: must be None. Leave it out, "
            "or use 'powers' or 'subspace'."
        )
    if niter is None and method in ITERATIONS:
        raise ValueError(f"method={method!r} needs niter, a number of power iterations (0, 1, …).")
    if niter is not None and (isinstance(niter, bool) or not isinstance(niter, int) or niter < 0):
        raise ValueError(f"niter={niter!r} is not supported: must be an integer of at least 0.")
    expected = (*matrix.shape[:-2], matrix.shape[-1])
    if start is not None and tuple(start.shape[:-1]) != expected:
        raise ValueError(
            f"start with shape {tuple(start.shape)} is not supported: must be "
            f"({', '.join(map(str, expected))}, k), as the matrix."
        )


def _chosen(matrix: Tensor | Operator, rank: int, *, warm: bool) -> str:
    """Return the method of "auto"."""
    smaller = min(matrix.shape[-2:])
    known = isinstance(matrix, Tensor)
    small = min(dense.DENSE_DIMENSION, dense.TRIPLET_DIMENSION) if known else dense.DENSE_DIMENSION
    if smaller <= small or rank > dense.DENSE_SHARE * smaller:
        return "gram"
    # With a good start the products are too few to pay for a Gram matrix.
    squared = known and smaller <= dense.GRAM_DIMENSION and not warm
    return "gram-krylov" if squared else "krylov"


def _by_squares(tall: Tensor, rank: int) -> Tensor | None:
    """Return right vectors by a dense solver, or None if float64 cannot resolve the tail."""
    matrix = gram_matrix(tall, torch.float64)
    size = matrix.shape[-1]
    values, vectors = dense.eigenpairs(matrix, size - rank, size)
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    missing = (trace - values.sum(-1)) / trace.clamp_min(torch.finfo(trace.dtype).tiny)
    lost = missing <= SQUARED_RESOLUTION[torch.float64]
    return None if tall.dtype == torch.float64 and bool(lost.any()) else vectors.flip(-1)


def _by_gram_products(
    tall: Tensor,
    rank: int,
    generator: Generators | None,
    start: Tensor | None,
    tolerance: float | None,
) -> Tensor | None:
    """Return right vectors by a Krylov space of the Gram matrix, or None."""
    shape = (*tall.shape[:-2], tall.shape[-1])
    width = block_width(rank, tall.shape[-1])

    def space(dtype: torch.dtype, start: Tensor | None) -> Subspace | None:
        matrix = gram_matrix(tall, dtype)
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
        block = start_block(shape, width, generator, start, dtype=dtype, device=tall.device)
        return leading_eigenspace(
            lambda block: matrix @ block,
            block,
            rank,
            trace=trace,
            warm=start is not None,
            tolerance=tolerance,
        )

    found = _resolved(space, tall.dtype, start, SQUARED_RESOLUTION)
    return None if found is None else found[0]


def _by_products(
    matrix: Tensor | Operator,
    operator: Operator,
    rank: int,
    generator: Generators | None,
    start: Tensor | None,
    tolerance: float | None,
) -> Decomposition | None:
    """Return triplets by a Krylov space of products with W and its transpose, or None."""
    *stack, m, n = operator.shape
    trace = frobenius_norm(matrix).square() if isinstance(matrix, Tensor) else None
    width = block_width(rank, min(m, n))
    maps = {operator.dtype: operator}

    def space(dtype: torch.dtype, start: Tensor | None) -> Subspace | None:
        if dtype not in maps:
            if operator.upcast is None:
                return None
            maps[dtype] = operator.upcast()
        device = operator.device
        block = start_block((*stack, n), width, generator, start, dtype=dtype, device=device)
        return leading_eigenspace(
            maps[dtype].there_and_back,
            block,
            rank,
            half=True,
            trace=trace,
            limit=m,
            warm=start is not None,
            tolerance=tolerance,
        )

    found = _resolved(space, operator.dtype, start, PRODUCT_RESOLUTION)
    return None if found is None else from_right(maps[found[1]], found[0], "krylov")


def _resolved(
    space: Callable[[torch.dtype, Tensor | None], Subspace | None],
    given: torch.dtype,
    start: Tensor | None,
    resolution: dict[torch.dtype, float],
) -> tuple[Tensor, torch.dtype] | None:
    """Return the vectors of a space in the given precision, or in float64 if the tail needs it.

    Also return that precision. The vectors are orthonormal to float64.
    """
    for dtype in dict.fromkeys([given, torch.float64]):
        found = space(dtype, start)
        if found is None or not found.converged:
            return None
        # What float64 cannot resolve in a float32 matrix is below that matrix's own rounding.
        if dtype != given or bool((found.missing > resolution[dtype]).all()):
            vectors, triangle = thin_qr(found.vectors.double())
            signs = torch.sign(triangle.diagonal(dim1=-2, dim2=-1))
            return vectors * signs[..., None, :], dtype
        start = found.vectors
    return None
