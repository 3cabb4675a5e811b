"""Operations on one matrix as large as a weight, each in a single pass over its memory.

The first write to a page of new memory has the operating system find and clear it. With small pages
this takes longer than the product of two factors that fills them. Large results therefore ask for
huge pages, and a chain of steps works on a few rows at a time, in memory that it reuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg.precision import wide_device

LARGE = 1 << 22
"""numpy asks Linux for huge pages from this many bytes; torch never does."""
ALIGNMENT = 64
"""The alignment of torch's own memory. numpy's may start anywhere."""
TOGETHER = 1 << 20
"""The numbers that a chain of steps processes at a time on a CPU: they fit the caches."""
WIDEST = 1 << 13
"""The number of squares that are summed in float32."""


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized tensor, on huge pages if it is large and on a CPU."""
    size = dtype.itemsize * math.prod(shape)
    if device.type != "cpu" or size < LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    block = np.empty(size + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return torch.from_numpy(block[start : start + size]).view(dtype).view(shape)


def rows_together(columns: int) -> int:
    """Return how many rows of a matrix a chain of steps processes at a time on a CPU."""
    return max(1, TOGETHER // columns)


def product(left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """Return ``left @ right`` without gradients, with the same bits as `products`."""
    if left.device.type != "cpu" or type(left) is not Tensor:  # an accelerator, or a sharded tensor
        return left @ right
    made = empty((left.shape[0], right.shape[1]), left.dtype, left.device)
    rows = rows_together(right.shape[1])
    for some, into in zip(left.split(rows), made.split(rows), strict=True):
        torch.mm(some, right, out=into)
    return made


def products(
    left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]
) -> Iterator[tuple[slice, Float[Tensor, "rows n"]]]:
    """Yield the rows of ``left @ right`` on a CPU, some at a time.

    Each item is a slice of rows and their product, in memory that the next item overwrites.
    """
    rows = rows_together(right.shape[1])
    block = left.new_empty(min(rows, len(left)), right.shape[1])
    for start in range(0, len(left), rows):
        some = left[start : start + rows]
        made = torch.mm(some, right, out=block[: len(some)])
        yield slice(start, start + len(some)), made


def frobenius_norm(matrix: Float[Tensor, "*stack m n"]) -> Float[Tensor, "*stack"]:
    """Return ``‖W‖`` in float64, right to 1e-7 of itself (1e-6 for 16 bits).

    It is on the device of W, or on the CPU if that device has no float64.

    Squares are summed in float32 along contiguous rows or columns, and these sums in float64. A sum
    in float32 alone would lose digits; one in float64 alone is many times slower.
    """
    if matrix.dtype == torch.float64:
        return torch.linalg.vector_norm(matrix, dim=(-2, -1))
    if matrix.stride(-1) > matrix.stride(-2):
        matrix = matrix.mT
    pieces = [
        torch.linalg.vector_norm(piece, dim=-1, dtype=torch.float32)
        for piece in matrix.split(WIDEST, dim=-1)
    ]
    sums = torch.cat(pieces, dim=-1)
    sums = sums.to(wide_device(sums.device))
    return torch.linalg.vector_norm(sums, dim=-1, dtype=torch.float64)


def is_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    # A sum reads the values once. Only a sum beyond the type's range needs the second pass.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return math.isfinite(float(total)) or bool(torch.isfinite(values).all())


def refuse_non_finite(name: str, weight: Tensor) -> None:
    """Check the weight of the target `name`.

    Raises:
        ValueError: it has NaN or infinite values.
    """
    if not is_finite(weight):
        raise ValueError(
            f"target {name!r}: its weight holds NaN or infinite values, and must be finite. The "
            "checkpoint is damaged, or its dtype is too small for its values. Load it again in a "
            "wider dtype."
        )


def widened(weight: Tensor) -> Tensor:
    """The tensor in float32 if it has a narrower dtype, else unchanged."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
