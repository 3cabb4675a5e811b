"""Memory for a matrix as large as a weight, about to be filled; and how to need less of it.

On a CPU the first write to each page has the system find and clear it. In pages of 4 KiB that takes
longer than the product of two factors that fills them: 46 MB are 11,265 pages, 32 ms. On huge
pages, which Linux gives to who asks, they are 534 and 24 ms (2 cores of a virtual machine; in
memory that was written to before, 12 ms). A chain of steps on such a matrix leaves a block behind
at each one: it is better done a part of the matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LARGE = 1 << 22
"""Bytes from which on numpy asks for huge pages; torch does not."""
ALIGNMENT = 64
"""Of torch's own blocks; numpy's start anywhere."""
TOGETHER = 1 << 20
"""Numbers that a chain of steps on a CPU takes at a time: the caches hold them, and the heap their
blocks, again and again."""


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty`: the numbers are whatever they are."""
    size = dtype.itemsize * prod(shape)
    if device.type != "cpu" or size < LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    block = np.empty(size + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return torch.from_numpy(block[start : start + size]).view(dtype).view(shape)


def rows_together(columns: int) -> int:
    """How many rows of a matrix a CPU takes at a time."""
    return max(1, TOGETHER // columns)


def product(left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """``left @ right``, of tensors that need no gradient; the bits that `products` makes."""
    if left.device.type != "cpu" or type(left) is not Tensor:  # another device's, or sharded
        return left @ right
    made = empty((left.shape[0], right.shape[1]), left.dtype, left.device)
    rows = rows_together(right.shape[1])
    for some, into in zip(left.split(rows), made.split(rows), strict=True):
        torch.mm(some, right, out=into)
    return made


def products(
    left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]
) -> Iterator[tuple[slice, Float[Tensor, "rows n"]]]:
    """``left @ right`` on a CPU some rows at a time: which, and the product in a block that the
    next ones will overwrite."""
    rows = rows_together(right.shape[1])
    block = left.new_empty(min(rows, len(left)), right.shape[1])
    for start in range(0, len(left), rows):
        some = left[start : start + rows]
        made = torch.mm(some, right, out=block[: len(some)])
        yield slice(start, start + len(some)), made


WIDEST = 1 << 13
"""Squares that are summed in float32."""


def frobenius_norm(matrix: Float[Tensor, "*stack m n"]) -> Float[Tensor, "*stack"]:
    """``‖W‖`` in float64, within 1e-7 of itself (1e-6 of 16 bits), in one reading of the memory.

    Squares are summed in float32 along rows (or columns, as they lie), and these sums in float64.
    Of 5632 × 2048 Gaussian numbers `torch.linalg.matrix_norm`, which sums all in float32, misses
    4.6e-4 in 4.8 ms, ``vector_norm(dtype=torch.float64)`` takes 50 ms, this 3.2 (2 CPU cores).
    """
    if matrix.dtype == torch.float64:
        return torch.linalg.vector_norm(matrix, dim=(-2, -1))
    if matrix.stride(-1) > matrix.stride(-2):
        matrix = matrix.mT
    pieces = [
        torch.linalg.vector_norm(piece, dim=-1, dtype=torch.float32)
        for piece in matrix.split(WIDEST, dim=-1)
    ]
    return torch.linalg.vector_norm(torch.cat(pieces, dim=-1), dim=-1, dtype=torch.float64)


def is_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity."""
    # One reading at the memory's speed; only a sum beyond the type's range needs the second look.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return math.isfinite(float(total)) or bool(torch.isfinite(values).all())


def refuse_non_finite(name: str, weight: Tensor) -> None:
    """Raises ValueError where the weight of the target `name` is not finite."""
    if not is_finite(weight):
        raise ValueError(
            f"target {name!r}: its weight holds NaN or infinite values; the checkpoint is "
            "damaged, or was read in a dtype that it overflows"
        )
