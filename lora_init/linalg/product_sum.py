"""Products of 16-bit matrices that are added to float32 sums without rounding the products.

A product of two bfloat16 or float16 numbers is exact in float32. Tensor cores of a GPU multiply
16-bit numbers and add in float32, at many times the rate of float32 products. torch calls this
`out_dtype`. Elsewhere the factors are converted to float32 first, which gives the same products.
"""

from __future__ import annotations

from enum import Enum
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class Support(Enum):
    """How a device multiplies 16-bit factors with float32 results."""

    NONE = "not at all"
    PRODUCT = "into a new matrix"
    SUM = "into a sum"


def add_product(
    total: Float[Tensor, "m n"],
    left: Float[Tensor, "m k"],
    right: Float[Tensor, "k n"],
    scale: float = 1.0,
) -> None:
    """Add ``scale * left @ right`` to `total`, in place and in its dtype.

    Args:
        total: float32 or float64, on the device of the factors.
        left, right: of one dtype, that of `total` or a 16-bit one.
    """
    dtype = total.dtype
    support = Support.NONE
    if dtype == torch.float32 and left.dtype in SIXTEEN_BITS:
        support = mixed_support(left.device, left.dtype)
    if support is Support.SUM:
        torch.addmm(total, left, right, alpha=scale, out_dtype=dtype, out=total)
    elif support is Support.PRODUCT:
        total.add_(torch.mm(left, right, out_dtype=dtype), alpha=scale)
    else:
        total.addmm_(left.to(dtype), right.to(dtype), alpha=scale)


@cache
def mixed_support(device: torch.device, dtype: torch.dtype) -> Support:
    """What `device` supports, found by trying: it depends on torch, the driver and the GPU."""
    if device.type != "cuda":
        return Support.NONE
    factor = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(factor, factor, out_dtype=torch.float32)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return Support.NONE
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return Support.PRODUCT
    return Support.SUM
