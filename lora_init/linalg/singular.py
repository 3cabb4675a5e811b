"""The largest singular triplets of a matrix, a stack or an operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import choice
from lora_init.linalg.decomposition import Decomposition, check, from_right, swapped
from lora_init.linalg.dense import eigenpairs, gram
from lora_init.linalg.krylov import Subspace, block_width, leading_eigenspace, start_block
from lora_init.linalg.operators import Operator

METHODS = ("auto", "exact", "gram", "gram-krylov", "krylov", "subspace")

Generators = torch.Generator | Sequence[torch.Generator]


@torch.no_grad()
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
        - "subspace": exactly `niter` power iterations ``X <- W^T W X`` from a random block, as
          `torch.svd_lowrank`. N counts multiplications, so a block wider than `rank` (by 8, or by 4
          from N = 2 on; cut off at the end) leaves its meaning alone: it buys accuracy at the same
          N, and never less, as the Ritz values of a larger subspace are no smaller. Where that is
          less work, the powers are those of the smaller Gram matrix.
        - "auto": one of the first four by shape, rank and device (see `choice`); "subspace" when
          `niter` is given.

    All but "subspace" keep the Frobenius error of the rank-r approximation within 1e-4 (relative)
    of the optimum, plus the rounding of the matrix's own dtype. Where they cannot (no convergence,
    or a tail so small that squaring loses it) the next more careful method answers, and the
    result's `method` says which one did.

    Args:
        matrix: (m, n), float32 or float64, any device; a stack of such; or an `Operator`.
        rank: 1 to min(m, n).
        niter: the number of power iterations of "subspace"; other methods take none.
        generator: a CPU generator for the test block, one for each matrix of a stack, drawn in
            float32 and then moved, so that the result does not depend on the device. None: a fresh
            one with seed 0.
        start: columns to begin with (the Krylov methods and "subspace"; the others ignore them),
            such as the last `right` of a matrix that has changed little; random ones are added.
        tolerance: when a Krylov space ends: it expects to gain less than this share of the squared
            error. None: `choice.KRYLOV_TOLERANCE`.

    Returns:
        A `Decomposition` in the matrix's dtype, signs fixed by `fix_signs`.

    Raises:
        ValueError: `matrix` is no float32 or float64 matrix, or an argument is outside the values
            above.

    References:
        Halko, Martinsson & Tropp 2011 (subspace iteration); Musco & Musco 2015 (block Krylov).
    """
    check(matrix, rank)
    _check_settings(matrix, method, niter, start)
    operator = matrix if isinstance(matrix, Operator) else Operator.dense(matrix)
    if niter is not None:
        return _subspace(matrix, operator, rank, niter, generator, start)
    if method == "auto":
        method = _chosen(matrix, rank, warm=start is not None)
    if method == "krylov":
        found, precise = _krylov(matrix, operator, rank, generator, start, tolerance)
        if found is not None:
            return from_right(precise, found.vectors, "krylov").to(operator.dtype)
    dense = matrix
    if isinstance(matrix, Operator):
        # A product's spectrum falls like both factors' together: it is formed in float64.
        dense = matrix.widened().to_dense()
    operator = Operator.dense(dense)
    if method == "exact":
        return _exact(operator, dense, rank).to(matrix.dtype)
    wide = dense.shape[-2] < dense.shape[-1]
    tall = dense.mT if wide else dense
    found, how = None, "gram-krylov"
    if method == "gram-krylov":
        found = _gram_krylov(tall, rank, generator, None if wide else start, tolerance)
    if found is None:
        found, how = _gram(tall, rank), "gram"
    if found is None:
        return _exact(operator, dense, rank).to(matrix.dtype)
    made = from_right(operator.transpose if wide else operator, found.vectors, how)
    made = made.to(matrix.dtype)
    return swapped(made) if wide else made


def _check_settings(
    matrix: Tensor | Operator, method: str, niter: int | None, start: Tensor | None
) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed are {', '.join(METHODS)}.")
    if niter is not None and method not in ("auto", "subspace"):
        raise ValueError(f"niter={niter} has no meaning for method={method!r}; use 'subspace'.")
    if niter is None and method == "subspace":
        raise ValueError("method='subspace' needs niter, a number of power iterations (0, 1, …).")
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
    right = torch.linalg.svd(dense, full_matrices=False)[2][..., :rank, :].mT
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
        trace = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64).square()
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
            operator.rmatmul, block, rank,
            half=operator.matmul, trace=trace, limit=m, warm=start is not None, tolerance=tolerance,
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
    vectors, triangle = torch.linalg.qr(found.vectors.double())
    signs = torch.sign(triangle.diagonal(dim1=-2, dim2=-1))
    return replace(found, vectors=vectors * signs[..., None, :])


def _subspace(
    matrix: Tensor | Operator,
    operator: Operator,
    rank: int,
    niter: int,
    generator: Generators | None,
    start: Tensor | None,
) -> Decomposition:
    *stack, m, n = operator.shape
    spare = choice.OVERSAMPLING // 2 if niter > 1 else choice.OVERSAMPLING
    width = block_width(rank, min(m, n), spare)
    block = start_block(
        (*stack, n), width, generator, start, dtype=operator.dtype, device=operator.device
    )
    if isinstance(matrix, Tensor) and choice.squaring_pays(m, n, width, niter):
        found = _projected(operator, _powers_by_gram(matrix, block, niter), rank)
        resolved = found.values[..., -1] > choice.GRAM_RESOLUTION * found.values[..., 0]
        if bool(resolved.all()):
            return found
    for _ in range(niter):
        block, _ = torch.linalg.qr(operator.matmul(block))
        block, _ = torch.linalg.qr(operator.rmatmul(block))
    return _projected(operator, block, rank)


def _powers_by_gram(matrix: Tensor, block: Tensor, niter: int) -> Tensor:
    """The same powers by products with the smaller Gram matrix, which is formed once."""
    wide = matrix.shape[-2] < matrix.shape[-1]
    square = gram(matrix.mT if wide else matrix, matrix.dtype)
    if wide:  # (W^T W)^N = W^T (W W^T)^(N-1) W
        block, _ = torch.linalg.qr(matrix @ block)
    for _ in range(niter - wide):
        block, _ = torch.linalg.qr(square @ block)
    return torch.linalg.qr(matrix.mT @ block)[0] if wide else block


def _projected(operator: Operator, block: Tensor, rank: int) -> Decomposition:
    """One more half step, as `torch.svd_lowrank`: the range of W X, then W projected on it."""
    left, _ = torch.linalg.qr(operator.matmul(block))
    return swapped(from_right(operator.transpose, left, "subspace", rank=rank))
