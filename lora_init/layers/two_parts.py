"""Products of bfloat16 matrices with float32 factors on a GPU's bfloat16 units.

A float32 number is split into bfloat16 parts: its nearest value, then the nearest value of the
remainder. Products of bfloat16 numbers are exact in float32, and the units sum them in float32. Two
parts keep 16 of float32's 24 bits, more than the 8 bits of a bfloat16 output. Three parts keep all.

CPUs do not support such products (`out_dtype`); there the sums are computed in float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

HAS_WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype")
"""Whether products of bfloat16 matrices on a GPU can return float32 (torch 2.8 and later)."""

HIGH_LOW = 2, slice(0, 1), 1
HIGH_HIGH_LOW = 3, slice(0, 2), 2
HIGH_LOW_HIGH = 3, slice(0, 3, 2), 1
"""Number of blocks, the blocks with the high part, and the block with the low part.

The product of the last two orders is high · high + high · low + low · high.
"""


def apply_to(matrix: Tensor, wide: torch.dtype) -> bool:
    """Whether products of this matrix with factors of dtype `wide` use bfloat16 parts."""
    is_half = matrix.is_cuda and matrix.dtype is torch.bfloat16
    is_plain = type(matrix) in (Tensor, nn.Parameter)
    return HAS_WIDE_PRODUCTS and is_half and is_plain and wide is torch.float32


def in_parts(
    wide: Float[Tensor, "rows columns"], order: tuple[int, slice, int], dim: int
) -> Float[Tensor, "rows_in_parts columns_in_parts"]:
    """The bfloat16 parts of a float32 matrix, concatenated along `dim`."""
    count, places, low = order
    shape = (*wide.shape[:dim], count, *wide.shape[dim:])
    parts = wide.new_empty(shape, dtype=torch.bfloat16)
    highs = parts[places] if dim == 0 else parts[:, places]
    highs.copy_(wide.unsqueeze(dim))
    high, rest = parts.select(dim, 0), parts.select(dim, low)
    if torch.compiler.is_compiling():  # rejects `out` with strides, and fuses these operations
        rest.copy_(wide - high)
    else:
        torch.sub(wide, high, out=rest)
    return parts.flatten(dim, dim + 1)


def wide_product(
    left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]
) -> Float[Tensor, "rows columns"]:
    """The product of bfloat16 matrices in float32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def left_by_factor(
    left: Float[Tensor, "rows inner"], factor: Float[Tensor, "inner rank"]
) -> Float[Tensor, "rows rank"]:
    """bfloat16 left times float32 factor, in float32. The large matrix is read once."""
    high, low = wide_product(left, in_parts(factor, HIGH_LOW, 1)).chunk(2, 1)
    return high + low


def factor_by_right(
    factor: Float[Tensor, "inner rank"], right: Float[Tensor, "inner columns"]
) -> Float[Tensor, "rank columns"]:
    """float32 factorᵀ times bfloat16 right, in float32. The large matrix is read once."""
    high, low = wide_product(in_parts(factor, HIGH_LOW, 1).T, right).chunk(2, 0)
    return high + low


def add_product(
    block: Float[Tensor, "rows columns"],
    left: Float[Tensor, "rows rank"],
    right: Float[Tensor, "rank columns"],
    scaling: float,
) -> Tensor:
    """block += scaling left right, for a bfloat16 block and float32 factors; rounded once."""
    left, right = in_parts(left, HIGH_HIGH_LOW, 1), in_parts(right, HIGH_LOW_HIGH, 0)
    if block.is_cuda:
        return block.addmm_(left, right, alpha=scaling)
    return block.add_(left.float() @ right.float(), alpha=scaling)
