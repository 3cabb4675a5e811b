"""Products XᵀX at half the price: only the upper block triangle is computed.

A general product computes every off-diagonal entry of XᵀX twice. Halving the columns repeatedly,

    XᵀX = [ X₁ᵀX₁   X₁ᵀX₂ ]
          [   ·     X₂ᵀX₂ ],

leaves the lower left block of every level out: one large product for the upper right one, the two
diagonal blocks by the same rule, down to SMALLEST_BLOCK. torch has no symmetric rank-k update.

Time as a share of the general product's, best of 5 to 15 runs, 2 CPU cores, float32, by the size
that is not split any further; equally wide strips of rows for comparison (the best of 64 … 768):

| columns × rows | 64 | 128 | 256 | 512 | strips |
|---|---|---|---|---|---|
| 384 × 2048 | 0.73 | 0.72 | 0.79 | – | 0.69 |
| 576 × 2048 | 0.67 | 0.68 | 0.71 | 0.83 | 0.68 |
| 1536 × 2048 | 0.68 | 0.67 | 0.66 | 0.70 | 0.71 |
| 1536 × 8192 | 0.69 | 0.69 | 0.68 | 0.71 | 0.71 |
| 2048 × 8192 | 0.71 | 0.64 | 0.63 | 0.67 | 0.60 |
| 4096 × 512 | 0.58 | 0.57 | 0.56 | 0.58 | 0.60 |

On one core all sizes up to 256 lie within 0.55 … 0.73. Strips' best size moves with the shape.

Small products wait for their threads longer than they take. On another machine, with as many rows
as are summed at a time (`lora_init.calibration.sums`), that is more than halves save:

| columns × rows | 64 | 128 | 256 | 512 |
|---|---|---|---|---|
| 384 × 512 | 2.45 | 1.50 | 1.15 | – |
| 576 × 512 | 0.95 | 0.74 | 0.54 | 0.48 |
| 1536 × 512 | 1.18 | 0.86 | 0.73 | 0.71 |

A pass over MiniLM that takes 2.10 plain ones with 128 takes 1.87 with 256.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg.product_sum import add_product

SMALLEST_BLOCK = {"cpu": 256, "cuda": 2048}
"""Columns that are not split any further. Smaller blocks would leave cores of a GPU idle."""

# Halves begin at a whole cache line (and a GPU's tile) of the columns.
ALIGNMENT = 16


def smallest_block(device: torch.device) -> int:
    """The columns that are not split any further on a device."""
    return SMALLEST_BLOCK.get(device.type, SMALLEST_BLOCK["cuda"])


def accumulate_gram(gram: Float[Tensor, "n n"], rows: Float[Tensor, "k n"]) -> None:
    """Add ``rows.T @ rows`` to the upper block triangle of `gram`; `mirror` completes it.

    Args:
        gram: changed in place; what lies below its diagonal blocks is neither read nor written.
        rows: of the same dtype (float32 or float64) and device, of any strides.
    """
    columns = rows.shape[1]
    if columns <= smallest_block(gram.device):
        gram.addmm_(rows.T, rows)
        return
    half = _half(columns)
    first, second = rows[:, :half], rows[:, half:]
    gram[:half, half:].addmm_(first.T, second)
    accumulate_gram(gram[:half, :half], first)
    accumulate_gram(gram[half:, half:], second)


def accumulate_gram_of_parts(
    gram: Float[Tensor, "n n"], high: Float[Tensor, "k n"], low: Float[Tensor, "k n"]
) -> None:
    """Add ``XᵀX`` of rows X = H + L, in two bfloat16 parts, to the upper block triangle.

    Of LᵀL only the diagonal is added. The other entries are as small as the rounding of the parts,
    and their signs are random; the diagonal's are all positive, and would shift the variances.

    Args:
        gram: float32, changed in place, as of `accumulate_gram`.
        high, low: as of `two_parts`.
    """
    squares = torch.linalg.vector_norm(low, dim=0, dtype=gram.dtype).square_()
    gram.diagonal().add_(squares)
    _accumulate_parts(gram, high, low)


def _accumulate_parts(gram: Tensor, high: Tensor, low: Tensor) -> None:
    """Add ``HᵀH + HᵀL + LᵀH`` to the upper block triangle.

    A block on the diagonal takes two products instead of three: HᵀH + 2 HᵀL, of which `mirror`
    keeps the symmetric part.
    """
    columns = high.shape[1]
    if columns <= smallest_block(gram.device):
        add_product(gram, high.T, high)
        add_product(gram, high.T, low, scale=2.0)
        return
    half = _half(columns)
    corner = gram[:half, half:]
    add_product(corner, high[:, :half].T, high[:, half:])
    add_product(corner, high[:, :half].T, low[:, half:])
    add_product(corner, low[:, :half].T, high[:, half:])
    _accumulate_parts(gram[:half, :half], high[:, :half], low[:, :half])
    _accumulate_parts(gram[half:, half:], high[:, half:], low[:, half:])


def two_parts(
    rows: Float[Tensor, "k n"],
) -> tuple[Float[Tensor, "k n"], Float[Tensor, "k n"]]:
    """Two bfloat16 parts of float32 rows, whose sum is right to 2^-17 of each number.

    bfloat16 has the range of float32, so that neither part overflows.
    """
    high = rows.to(torch.bfloat16)
    return high, torch.sub(rows, high, out=torch.empty_like(high))


def mirror(gram: Float[Tensor, "n n"]) -> None:
    """Copy the upper triangle of `gram` onto its lower one, in place.

    A block on the diagonal, as the functions above leave it, becomes its symmetric part.
    """
    columns = len(gram)
    if columns <= smallest_block(gram.device):
        gram.copy_((gram + gram.T).div_(2))
        return
    half = _half(columns)
    gram[half:, :half] = gram[:half, half:].T
    mirror(gram[:half, :half])
    mirror(gram[half:, half:])


def _half(columns: int) -> int:
    return -(-columns // (2 * ALIGNMENT)) * ALIGNMENT
