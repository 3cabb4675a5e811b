"""Products with an adapter's factors, computed in the factors' dtype.

The functions match those of `lora_init.layers.two_parts`, for every device and dtype. 16-bit
matrices are converted, which is exact.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def left_by_factor(
    left: Float[Tensor, "rows inner"], factor: Float[Tensor, "inner rank"]
) -> Float[Tensor, "rows rank"]:
    """left times factor, in the factor's dtype."""
    return left.to(factor.dtype) @ factor


def factor_by_right(
    factor: Float[Tensor, "inner rank"], right: Float[Tensor, "inner columns"]
) -> Float[Tensor, "rank columns"]:
    """factorᵀ times right, in the factor's dtype."""
    return factor.T @ right.to(factor.dtype)


def add_product(
    block: Float[Tensor, "rows columns"],
    left: Float[Tensor, "rows rank"],
    right: Float[Tensor, "rank columns"],
    scaling: float,
) -> Tensor:
    """block += scaling left right, rounded once. The factors may be wider than the block."""
    if block.dtype == left.dtype:
        return block.addmm_(left, right, alpha=scaling)
    return block.add_(left @ right, alpha=scaling)
