"""The beginning of a QR decomposition."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import choice
from lora_init.linalg.decomposition import check
from lora_init.linalg.mixed_products import is_narrow, transposed_product
from lora_init.linalg.precision import full_precision
from lora_init.linalg.thin import householder_signs, thin_qr


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
