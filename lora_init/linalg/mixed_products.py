"""Products with 16-bit matrices in float32 precision, without a float32 copy of the matrix.

A product of two bfloat16 or float16 numbers is exact in float32. A GPU multiplies 16-bit numbers
and adds them in float32 at many times the rate of float32 products; torch calls this `out_dtype`.
A float32 block X is written as a sum of 16-bit parts:

    W X = W X_1 + W X_2 + W X_3,    X_1 = round(X), X_2 = round(X - X_1), X_3 = round(X - X_1 - X_2)

Three bfloat16 parts have the 24 bits of float32. Two float16 parts have 22 bits. For float16, each
column is first divided by a power of two so that its largest entry is below 1, and the second part
is stored `FLOAT16_STEP` times as large: otherwise small entries would fall below float16's range.
Other devices, such as a CPU, use a float32 copy.
"""

from __future__ import annotations

from enum import Enum
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
FLOAT16_STEP = 2.0**11


class Support(Enum):
    """How a device multiplies 16-bit factors with float32 results."""

    NONE = "not at all"
    PRODUCT = "into a new matrix"
    SUM = "into a sum"


@cache
def mixed_support(device: torch.device, dtype: torch.dtype) -> Support:
    """Try what `device` supports: it depends on torch, the driver and the GPU."""
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


def is_narrow(dtype: torch.dtype) -> bool:
    """Return whether `dtype` is one of the 16-bit types of weights."""
    return dtype in SIXTEEN_BITS


def has_mixed_products(matrix: Tensor) -> bool:
    """Return whether the matrix has 16 bits and its device multiplies it with float32 results."""
    if not is_narrow(matrix.dtype):
        return False
    return mixed_support(matrix.device, matrix.dtype) is not Support.NONE


def add_product(
    total: Float[Tensor, "m n"],
    left: Float[Tensor, "m k"],
    right: Float[Tensor, "k n"],
    scale: float = 1.0,
) -> None:
    """Add ``scale * left @ right`` to `total`, in place and without rounding to 16 bits.

    Args:
        total: float32 or float64, on the device of the factors.
        left, right: both in the dtype of `total`, or both in one 16-bit dtype.
    """
    dtype = total.dtype
    support = Support.NONE
    if dtype == torch.float32 and is_narrow(left.dtype):
        support = mixed_support(left.device, left.dtype)
    if support is Support.SUM:
        torch.addmm(total, left, right, alpha=scale, out_dtype=dtype, out=total)
    elif support is Support.PRODUCT:
        total.add_(torch.mm(left, right, out_dtype=dtype), alpha=scale)
    else:
        total.addmm_(left.to(dtype), right.to(dtype), alpha=scale)


def product(
    matrix: Float[Tensor, "*stack m n"], block: Float[Tensor, "*stack n k"]
) -> Float[Tensor, "*stack m k"]:
    """Return ``matrix block`` in float32."""
    if not has_mixed_products(matrix):
        return matrix.float() @ block
    parts, scale = split(block, matrix.dtype)
    return joined(_multiply(matrix, parts), matrix.dtype, scale)


def transposed_product(
    matrix: Float[Tensor, "*stack m n"], block: Float[Tensor, "*stack m k"]
) -> Float[Tensor, "*stack n k"]:
    """Return ``matrix^T block`` in float32."""
    if not has_mixed_products(matrix):
        return (block.mT @ matrix.float()).mT
    parts, scale = split(block, matrix.dtype)
    return joined(_multiply(parts.mT, matrix).mT, matrix.dtype, scale)


def split(
    block: Float[Tensor, "*stack n k"], dtype: torch.dtype
) -> tuple[Float[Tensor, "*stack n parts_k"], Tensor | None]:
    """Return the parts of a block, side by side, and the scale of its columns (None: 1)."""
    columns = block.shape[-1]
    count = 3 if dtype == torch.bfloat16 else 2
    parts = block.new_empty(*block.shape[:-1], count * columns, dtype=dtype)
    scale = None
    if dtype == torch.float16:
        largest = block.abs().amax(-2, keepdim=True)
        scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
        block = block / scale
    first, *others = parts.split(columns, dim=-1)
    first.copy_(block)
    for part, last in zip(others, (first, *others), strict=False):
        block = block - last
        if dtype == torch.float16:
            block = block * FLOAT16_STEP
        part.copy_(block)
    return parts, scale


def joined(
    products: Float[Tensor, "*stack m parts_k"], dtype: torch.dtype, scale: Tensor | None
) -> Float[Tensor, "*stack m k"]:
    """Return the product with a block, from the products with its parts."""
    if scale is None:  # bfloat16
        return products.unflatten(-1, (3, -1)).sum(-2)
    first, second = products.chunk(2, dim=-1)
    return torch.add(first, second, alpha=1 / FLOAT16_STEP) * scale


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two 16-bit matrices, or stacks of them, with sums and results in float32."""
    if left.ndim == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    stack = left.shape[:-2]
    flat = [part.reshape(-1, *part.shape[-2:]) for part in (left, right)]
    found = torch.bmm(*flat, out_dtype=torch.float32)
    return found.reshape(*stack, *found.shape[-2:])
