"""Thin QR and singular value decompositions of tall blocks, and of the first columns of a matrix.

On a CPU, LAPACK computes them. On CUDA, torch decomposes the blocks of a stack one after another.
There a whole stack is decomposed by Cholesky's method, twice, with Gram matrices in float64:

    Xᵀ X = L Lᵀ,    Q = X L⁻ᵀ,    R = Lᵀ.

The first pass loses orthogonality with the square of X's condition number, and the second restores
it. Blocks for which this fails, such as rank-deficient ones, go to Householder's method.

Source: Yamamoto, Nakatsukasa, Yanagisawa & Fukaya 2015 (CholeskyQR2); Ballard et al. 2014 (signs of
Householder's method from an orthonormal basis).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lora_init.linalg import dense
from lora_init.linalg.mixed_products import is_narrow, transposed_product
from lora_init.linalg.operators import check
from lora_init.linalg.precision import full_precision

LARGEST_CORRECTION = 0.1
"""The largest entry of QᵀQ - I that the first pass may leave for the second."""


@torch.no_grad()
@full_precision()
def leading_qr(
    matrix: Float[Tensor, "*stack m n"], rank: int
) -> tuple[Float[Tensor, "*stack m rank"], Float[Tensor, "*stack rank n"]]:
    """Return the first `rank` columns of Q and rows of R, from the thin QR of the whole matrix.

    Column j of Q depends on the first j columns of W only. ``Q = qr(W[:, :r])`` and ``R = Q^T W``
    are therefore the same factors, in O(m n r). Signs are LAPACK's on every device.

    Args:
        matrix: (m, n) or a stack, float32, float64, bfloat16 or float16.
        rank: 1 to min(m, n).

    Returns:
        Q and R in the matrix's dtype; in float32 for 16 bits.

    Raises:
        ValueError: as `top_singular`.
    """
    check(matrix, rank, narrow=True)
    wide = torch.promote_types(matrix.dtype, torch.float32)
    basis, triangle = thin_qr(matrix[..., :rank].to(wide))
    if matrix.device.type not in dense.LAPACK_DEVICES:
        signs = householder_signs(basis)
        basis, triangle = basis * signs[..., None, :], triangle * signs[..., :, None]
    rest = matrix[..., rank:]
    if is_narrow(matrix.dtype):
        return basis, torch.cat([triangle, transposed_product(rest, basis).mT], dim=-1)
    return basis, torch.cat([triangle, basis.mT @ rest], dim=-1)


def thin_svd(
    block: Float[Tensor, "*stack m k"],
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack k"], Float[Tensor, "*stack k k"]]:
    """Return U, the singular values and Vᵀ of a block with at least as many rows as columns."""
    basis, triangle = thin_qr(block)
    turns, values, right = dense.svd(triangle)
    return basis @ turns, values, right


def thin_qr(
    block: Float[Tensor, "*stack m k"],
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack k k"]]:
    """Return Q with orthonormal columns and upper triangular R.

    The signs of R's diagonal differ between devices.
    """
    basis, triangle, good = unchecked_qr(block)
    if good is None or bool(good.all()):
        return basis, triangle
    if block.ndim == 2:
        return torch.linalg.qr(block)
    basis, triangle = basis.clone(), triangle.clone()
    basis[~good], triangle[~good] = torch.linalg.qr(block[~good])
    return basis, triangle


def unchecked_qr(
    block: Float[Tensor, "*stack m k"],
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack k k"], Bool[Tensor, "*stack"] | None]:
    """Return Q, R and whether each block's are right (None: all), without a wait for the device."""
    if block.device.type in dense.LAPACK_DEVICES or block.shape[-1] > block.shape[-2]:
        return *torch.linalg.qr(block), None
    return cholesky_qr(block)


def cholesky_qr(
    block: Float[Tensor, "*stack m k"],
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack k k"], Bool[Tensor, "*stack"]]:
    """Return Q and R by Cholesky's method, applied twice, and for which blocks they are right."""
    exact = block.double()
    # Columns are normalized: the squares of the first pass then lose less.
    gram = exact.mT @ exact
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    gram = gram / (scale[..., :, None] * scale[..., None, :])
    lower, failed = torch.linalg.cholesky_ex(gram)
    inverse = torch.linalg.solve_triangular(lower, torch.diag_embed(1 / scale), upper=False)
    basis, triangle = exact @ inverse.mT, lower.mT * scale[..., None, :]
    # What the first pass leaves shows how near to orthonormal it came.
    gram = basis.mT @ basis
    lower, again = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    distance = torch.linalg.vector_norm(gram - identity, ord=torch.inf, dim=(-2, -1))
    inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    basis, triangle = basis @ inverse.mT, lower.mT @ triangle
    good = (distance <= LARGEST_CORRECTION) & (failed + again == 0)
    return basis.to(block.dtype), triangle.to(block.dtype), good


def householder_signs(basis: Float[Tensor, "*stack m k"]) -> Float[Tensor, "*stack k"]:
    """Return ±1 per column: the factors that turn an orthonormal basis into Householder's.

    LAPACK turns each column into minus the sign of its pivot. The pivots follow from elimination
    without exchanges on ``Q₁ - S``, where Q₁ is the first k rows.
    """
    rest = basis[..., : basis.shape[-1], :].double().cpu().clone()
    signs = torch.empty(rest.shape[:-1], dtype=torch.float64)
    for column in range(rest.shape[-1]):
        pivot = rest[..., column, column]
        sign = torch.where(pivot >= 0, -1.0, 1.0).double()
        if column == basis.shape[-2] - 1:  # nothing is left to reflect: LAPACK keeps the sign
            sign = -sign
        signs[..., column] = sign
        below = rest[..., column + 1 :, column] / (pivot - sign)[..., None]
        rest[..., column + 1 :, column + 1 :] -= (
            below[..., :, None] * rest[..., column, column + 1 :][..., None, :]
        )
    return signs.to(basis)
