"""The largest singular triplets of a matrix, a stack or an operator."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import dense as choice
from lora_init.linalg import dense as small
from lora_init.linalg.decomposition import (
    Decomposition,
    from_right,
    one_by_one,
    swapped,
)
from lora_init.linalg.dense import eigenpairs, gram
from lora_init.linalg.krylov import Subspace, block_width, leading_eigenspace, start_block
from lora_init.linalg.matrix import frobenius_norm
from lora_init.linalg.mixed_products import has_mixed_products, is_narrow
from lora_init.linalg.operators import Operator, check
from lora_init.linalg.powers import Generators, by_iterations, by_powers
from lora_init.linalg.precision import full_precision
from lora_init.linalg.thin import thin_qr

QUALITY = ("exact", "gram", "gram-krylov", "krylov")
"""The methods that keep the promised quality."""
ITERATIONS = ("powers", "subspace")
"""Those that do what `niter` asks for."""
METHODS = ("auto", *QUALITY, *ITERATIONS)


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
        - "gram": a dense eigensolver on the smaller of ``W W^T`` and ``W^T W`` in float64.
        - "gram-krylov": a block Krylov space (see `krylov`) of the same matrix in W's dtype: the
          products are with n × n numbers, however tall W is.
        - "krylov": the same by products with W and its transpose; nothing is squared.
        - "powers": what `niter` power iterations give, or better, from a block Krylov space of
          ``sqrt(2 niter)`` steps (see `powers`).
        - "subspace": exactly `niter` power iterations ``X <- W^T W X`` from a random block a little
          wider than `rank`, as `torch.svd_lowrank`.
        - "auto": one of the first four by shape, rank and device (see `choice`); "powers" when
          `niter` is given.

    The first four keep the Frobenius error of the rank-r approximation within 1e-4 (relative)
    of the optimum, plus the rounding of the matrix's own dtype. Where they cannot (no convergence,
    or a tail so small that squaring loses it) the next more careful method answers, and the
    result's `method` says which one did.

    Args:
        matrix: (m, n), float32, float64, bfloat16 or float16, any device; a stack of such; or an
            `Operator`. A matrix of 16 bits is decomposed in float32.
        rank: 1 to min(m, n).
        niter: the number of power iterations of "powers" and "subspace"; others take none.
        generator: a CPU generator for the test block, one for each matrix of a stack, drawn in
            float32 and then moved, so that the result does not depend on the device. None: a fresh
            one with seed 0.
        start: columns to begin with ("exact" and "gram" ignore them),
            such as the last `right` of a matrix that has changed little; random ones are added.
        tolerance: when a Krylov space ends: it expects to gain less than this share of the squared
            error. None: `choice.KRYLOV_TOLERANCE`.

    Returns:
        A `Decomposition` in the matrix's dtype (float32 for 16 bits), signs fixed by `fix_signs`.

    Raises:
        ValueError: `matrix` is not such a matrix, or an argument is outside the values
            above.

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
        found, precise = _krylov(matrix, operator, rank, generator, start, tolerance)
        if found is not None:
            return from_right(precise, found.vectors, "krylov").to(operator.dtype)
        members = matrix if isinstance(matrix, Tensor) else matrix.members and matrix.members()
        if members is not None and len(matrix.shape) > 2:  # a dense solver only where it is needed
            decompose = partial(top_singular, rank=rank, method=method, tolerance=tolerance)
            return one_by_one(decompose, members, generator, start)
    dense = matrix
    if isinstance(matrix, Operator):
        # A product's spectrum falls like both factors' together: it is formed in float64.
        dense = matrix.widened().to_dense()
    elif dense.dtype != given:
        dense = dense.to(given)
    operator = Operator.dense(dense)
    if method == "exact":
        return _exact(operator, dense, rank).to(given)
    wide = dense.shape[-2] < dense.shape[-1]
    tall = dense.mT if wide else dense
    found, how = None, "gram-krylov"
    if method == "gram-krylov":
        found = _gram_krylov(tall, rank, generator, None if wide else start, tolerance)
    if found is None:
        found, how = _gram(tall, rank), "gram"
    if found is None:
        return _exact(operator, dense, rank).to(given)
    made = from_right(operator.transpose if wide else operator, found.vectors, how)
    made = made.to(given)
    return swapped(made) if wide else made


def _check_settings(
    matrix: Tensor | Operator, method: str, niter: int | None, start: Tensor | None
) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed are {', '.join(METHODS)}.")
    if niter is not None and method in QUALITY:
        raise ValueError(
            f"niter={niter} has no meaning for method={method!r}; use 'powers' or 'subspace'."
        )
    if niter is None and method in ITERATIONS:
        raise ValueError(f"method={method!r} needs niter, a number of power iterations (0, 1, …).")
    if niter is not None and (isinstance(niter, bool) or not isinstance(niter, int) or niter < 0):
        raise ValueError(f"niter={niter!r} is not allowed; give an integer of at least 0.")
    expected = (*matrix.shape[:-2], matrix.shape[-1])
    if start is not None and tuple(start.shape[:-1]) != expected:
        raise ValueError(
            f"start has shape {tuple(start.shape)}; allowed is "
            f"({', '.join(map(str, expected))}, k), as the matrix."
        )


def _chosen(matrix: Tensor | Operator, rank: int, *, warm: bool) -> str:
    """The method of "auto"."""
    smaller = min(matrix.shape[-2:])
    if smaller <= choice.DENSE_DIMENSION or rank > choice.DENSE_SHARE * smaller:
        return "gram"
    # A good start needs so few products that a Gram matrix does not pay.
    squared = isinstance(matrix, Tensor) and smaller <= choice.GRAM_DIMENSION and not warm
    return "gram-krylov" if squared else "krylov"


def _exact(operator: Operator, dense: Tensor, rank: int) -> Decomposition:
    right = small.svd(dense)[2][..., :rank, :].mT
    return from_right(operator, right, "exact")


def _gram(tall: Tensor, rank: int) -> Subspace | None:
    """By a dense solver, or None where float64 cannot resolve the tail of the squares."""
    matrix = gram(tall, torch.float64)
    size = matrix.shape[-1]
    values, vectors = eigenpairs(matrix, size - rank, size)
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    missing = (trace - values.sum(-1)) / trace.clamp_min(torch.finfo(trace.dtype).tiny)
    if tall.dtype == torch.float64 and bool((missing <= choice.RESOLUTION[torch.float64]).any()):
        return None
    return Subspace(values.flip(-1), vectors.flip(-1), missing, torch.zeros_like(values), True)


def _gram_krylov(
    tall: Tensor,
    rank: int,
    generator: Generators | None,
    start: Tensor | None,
    tolerance: float | None,
) -> Subspace | None:
    """By a Krylov space of the Gram matrix, in float64 where float32 cannot resolve the tail."""
    width = block_width(rank, tall.shape[-1])
    shape = (*tall.shape[:-2], tall.shape[-1])
    given = tall.dtype
    for dtype in dict.fromkeys([given, torch.float64]):
        matrix = gram(tall, dtype)
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
        block = start_block(shape, width, generator, start, dtype=dtype, device=tall.device)
        multiply = lambda block, matrix=matrix: matrix @ block  # noqa: E731
        found = leading_eigenspace(
            multiply, block, rank, trace=trace, warm=start is not None, tolerance=tolerance
        )
        if found is None or not found.converged:
            return None
        # What float64 cannot resolve of a float32 matrix is below that matrix's own rounding.
        if dtype != given or bool((found.missing > choice.RESOLUTION[dtype]).all()):
            return _orthonormal(found)
        start = found.vectors
    return None


def _krylov(
    matrix: Tensor | Operator,
    operator: Operator,
    rank: int,
    generator: Generators | None,
    start: Tensor | None,
    tolerance: float | None,
) -> tuple[Subspace | None, Operator]:
    """By products with W and its transpose, in float64 where float32 cannot resolve the tail; with
    the map that was precise enough.
    """
    *stack, m, n = operator.shape
    trace = None
    if isinstance(matrix, Tensor):
        trace = frobenius_norm(matrix).square()
    width = block_width(rank, min(m, n))
    given = operator.dtype
    for dtype in dict.fromkeys([given, torch.float64]):
        if dtype != given:
            if operator.upcast is None:
                return None, operator
            operator = operator.upcast()
        block = start_block(
            (*stack, n), width, generator, start, dtype=dtype, device=operator.device
        )
        found = leading_eigenspace(
            operator.there_and_back, block, rank,
            half=True, trace=trace, limit=m, warm=start is not None, tolerance=tolerance,
        )  # fmt: skip
        if found is None or not found.converged:
            return None, operator
        # What float64 cannot resolve of a float32 matrix is below that matrix's own rounding.
        if dtype != given or bool((found.missing > choice.PRODUCT_RESOLUTION[dtype]).all()):
            return _orthonormal(found), operator
        start = found.vectors
    return None, operator


def _orthonormal(found: Subspace) -> Subspace:
    """Its vectors orthonormal to float64: from a large basis they are so to its rounding only."""
    vectors, triangle = thin_qr(found.vectors.double())
    signs = torch.sign(triangle.diagonal(dim1=-2, dim2=-1))
    return replace(found, vectors=vectors * signs[..., None, :])
