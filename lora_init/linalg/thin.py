"""Thin QR and singular value decompositions of a tall block, or of a stack of them.

On a CPU the QR decomposition is LAPACK's. On CUDA torch decomposes the blocks of a stack one after
another. There the whole stack is decomposed by Cholesky's method, twice, with Gram matrices in
float64:

    Xᵀ X = L Lᵀ,    Q = X L⁻ᵀ,    R = Lᵀ.

One pass loses orthogonality with the square of X's condition number; a second pass restores it to
rounding where the first one left any. Blocks of which this is not so, such as rank-deficient ones,
are decomposed by Householder's method: it completes them to an orthonormal basis.

Source: Yamamoto, Nakatsukasa, Yanagisawa & Fukaya 2015 (CholeskyQR2); Ballard et al. 2014 (signs of
Householder's method from an orthonormal basis).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lora_init.linalg import dense as choice
from lora_init.linalg import dense as small
from lora_init.linalg.mixed_products import is_narrow, transposed_product
from lora_init.linalg.operators import check
from lora_init.linalg.precision import full_precision


def thin_qr(
    block: Float[Tensor, "*stack m k"],
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack k k"]]:
    """Q with orthonormal columns and upper triangular R, of a block with no more columns than rows.

    The signs of R's diagonal differ between devices.
    """
    if block.device.type in choice.LAPACK_DEVICES or block.shape[-1] > block.shape[-2]:
        return torch.linalg.qr(block)
    basis, triangle, good = cholesky_qr(block)
    if bool(good.all()):
        return basis, triangle
    if block.ndim == 2:
        return torch.linalg.qr(block)
    # Only the blocks that need it.
    basis, triangle = basis.clone(), triangle.clone()
    basis[~good], triangle[~good] = torch.linalg.qr(block[~good])
    return basis, triangle


def unchecked_qr(
    block: Float[Tensor, "*stack m k"],
) -> tuple[
    Float[Tensor, "*stack m k"], Float[Tensor, "*stack k k"], Bool[Tensor, "*stack"] | None
]:
    """As `thin_qr`, without a wait for the device: whether each block is right is returned.

    None: all are.
    """
    if block.device.type in choice.LAPACK_DEVICES or block.shape[-1] > block.shape[-2]:
        return *torch.linalg.qr(block), None
    return cholesky_qr(block)


def thin_svd(
    block: Float[Tensor, "*stack m k"],
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack k"], Float[Tensor, "*stack k k"]]:
    """U, the singular values and Vᵀ of a block with no more columns than rows, by its QR."""
    basis, triangle = thin_qr(block)
    turns, values, right = small.svd(triangle)
    return basis @ turns, values, right


def cholesky_qr(
    block: Float[Tensor, "*stack m k"],
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack k k"], Bool[Tensor, "*stack"]]:
    """Q and R by Cholesky's method, twice, and of which blocks they are right."""
    exact = block.double()
    # Columns are normalized: then the squares of the first pass lose less.
    gram = exact.mT @ exact
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    gram = gram / (scale[..., :, None] * scale[..., None, :])
    lower, failed = torch.linalg.cholesky_ex(gram)
    inverse = _solved(lower, torch.diag_embed(1 / scale))
    basis, triangle = exact @ inverse.mT, lower.mT * scale[..., None, :]
    # What the first pass leaves shows how near to orthonormal it came.
    gram = basis.mT @ basis
    lower, again = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    distance = torch.linalg.vector_norm(gram - identity, ord=torch.inf, dim=(-2, -1))
    basis = basis @ _solved(lower, identity.expand_as(lower)).mT
    triangle = lower.mT @ triangle
    good = (distance <= choice.LARGEST_CORRECTION) & (failed + again == 0)
    return basis.to(block.dtype), triangle.to(block.dtype), good


def _solved(lower: Tensor, block: Tensor) -> Tensor:
    """``L^-1 block``."""
    return torch.linalg.solve_triangular(lower, block, upper=False)


def householder_signs(basis: Float[Tensor, "*stack m k"]) -> Float[Tensor, "*stack k"]:
    """±1 for each column of an orthonormal basis: what makes it the one of Householder's method.

    LAPACK turns each column into minus the sign of its pivot. The pivots follow from elimination
    without exchanges on ``Q₁ - S``, Q₁ being the first k rows.
    """
    rest = basis[..., : basis.shape[-1], :].double().cpu().clone()
    signs = torch.empty(rest.shape[:-1], dtype=torch.float64)
    for column in range(rest.shape[-1]):
        pivot = rest[..., column, column]
        sign = torch.where(pivot >= 0, -1.0, 1.0).double()
        signs[..., column] = sign
        below = rest[..., column + 1 :, column] / (pivot - sign)[..., None]
        rest[..., column + 1 :, column + 1 :] -= (
            below[..., :, None] * rest[..., column, column + 1 :][..., None, :]
        )
    return signs.to(basis)


@torch.no_grad()
@full_precision()
def leading_qr(
    matrix: Float[Tensor, "*stack m n"], rank: int
) -> tuple[Float[Tensor, "*stack m rank"], Float[Tensor, "*stack rank n"]]:
    """Return the first `rank` columns of Q and rows of R, of the thin QR of the whole matrix.

    Column j of Q depends on the first j columns of W only, so ``Q = qr(W[:, :r])`` and
    ``R = Q^T W`` are the same factors in O(m n r). Signs are LAPACK's on every device. Of a matrix
    of 16 bits they are float32.

    Raises:
        ValueError: as `top_singular`.
    """
    check(matrix, rank, narrow=True)
    wide = torch.promote_types(matrix.dtype, torch.float32)
    basis, triangle = thin_qr(matrix[..., :rank].to(wide))
    if matrix.device.type not in choice.LAPACK_DEVICES:
        signs = householder_signs(basis)
        basis, triangle = basis * signs[..., None, :], triangle * signs[..., :, None]
    rest = matrix[..., rank:]
    if is_narrow(matrix.dtype):
        return basis, torch.cat([triangle, transposed_product(rest, basis).mT], dim=-1)
    return basis, torch.cat([triangle, basis.mT @ rest], dim=-1)
