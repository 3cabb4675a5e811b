"""Gram matrices XᵀX, summed from blocks of rows at half the price of a general product.

A general product computes every off-diagonal entry of XᵀX twice, and torch has no symmetric rank-k
update. Here the columns are halved repeatedly, and the lower left block is skipped at every level:

    XᵀX = [ X₁ᵀX₁   X₁ᵀX₂ ]
          [   ·     X₂ᵀX₂ ]

Rows that arrive in pieces of any size are collected into blocks that a device multiplies fast. They
are shifted by the mean of the first piece: sums about zero would lose a variance that is small
compared with the squared mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_init.linalg.mixed_products import add_product, is_narrow

SMALLEST_BLOCK = {"cpu": 256, "cuda": 2048}
"""Columns that are not split further: smaller products would leave cores idle."""
ALIGNMENT = 16  # halves begin at a whole cache line, or a GPU's tile
WIDENED_ROWS = 4096  # rows that `gram_matrix` converts at a time
ROWS = 512
"""Rows of a block on a CPU."""
WAITING_BYTES = 4 * ROWS
"""Bytes of each column that wait for more rows on an accelerator."""
LARGEST_BLOCK = 4096
"""Rows of a block on an accelerator: this bounds the memory of the converted copy."""


def gram_matrix(
    tall: Float[Tensor, "*stack m n"], dtype: torch.dtype
) -> Float[Tensor, "*stack n n"]:
    """Return ``W^T W`` summed in `dtype`, without a copy of all of W in it."""
    n = tall.shape[-1]
    result = tall.new_zeros(*tall.shape[:-2], n, n, dtype=dtype)
    for rows in tall.split(WIDENED_ROWS, dim=-2):
        rows = rows.to(dtype)
        if rows.ndim == 2:
            accumulate_gram(result, rows)
        else:
            result += rows.mT @ rows
    if tall.ndim == 2:
        mirror(result)
    return result


def accumulate_gram(gram: Float[Tensor, "n n"], rows: Float[Tensor, "k n"]) -> None:
    """Add ``rows.T @ rows`` to the upper block triangle of `gram`; `mirror` completes it.

    Args:
        gram: changed in place; what lies below its diagonal blocks is neither read nor written.
        rows: of the same dtype (float32 or float64) and device, with any strides.
    """
    columns = rows.shape[1]
    if columns <= _smallest(gram):
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
    """Add ``XᵀX`` of rows X = H + L, given as two bfloat16 parts, to the upper block triangle.

    Only the diagonal of LᵀL is added. Its other entries are as small as the rounding of the parts
    and have random signs; the diagonal is positive, and leaving it out would shift the variances.

    Args:
        gram: float32, changed in place as by `accumulate_gram`.
        high, low: from `two_parts`.
    """
    squares = torch.linalg.vector_norm(low, dim=0, dtype=gram.dtype).square_()
    gram.diagonal().add_(squares)
    _accumulate_parts(gram, high, low)


def _accumulate_parts(gram: Tensor, high: Tensor, low: Tensor) -> None:
    """Add ``HᵀH + HᵀL + LᵀH`` to the upper block triangle.

    A diagonal block takes two products instead of three: HᵀH + 2 HᵀL, whose symmetric part `mirror`
    keeps.
    """
    columns = high.shape[1]
    if columns <= _smallest(gram):
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
    """Split float32 rows into two bfloat16 parts. Their sum is right to 2^-17 of each number."""
    high = rows.to(torch.bfloat16)
    return high, torch.sub(rows, high, out=torch.empty_like(high))


def mirror(gram: Float[Tensor, "n n"]) -> None:
    """Copy the upper triangle of `gram` to the lower one, in place.

    A block on the diagonal becomes its symmetric part.
    """
    columns = len(gram)
    if columns <= _smallest(gram):
        gram.copy_((gram + gram.T).div_(2))
        return
    half = _half(columns)
    gram[half:, :half] = gram[:half, half:].T
    mirror(gram[:half, :half])
    mirror(gram[half:, half:])


def _smallest(gram: Tensor) -> int:
    return SMALLEST_BLOCK.get(gram.device.type, SMALLEST_BLOCK["cuda"])


def _half(columns: int) -> int:
    return -(-columns // (2 * ALIGNMENT)) * ALIGNMENT


@dataclass(frozen=True)
class Block:
    """Some rows that are multiplied at once.

    Attributes:
        rows: minus the shift, in the dtype of the sums.
        sixteen_bits: whether the model computed all of them in 16 bits.
    """

    rows: Float[Tensor, "rows in"]
    sixteen_bits: bool


class RowBlocks(ABC):
    """Rows that arrive in pieces of any size and leave as blocks of `dtype` on `device`."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self.width, self.device, self.dtype = width, device, dtype
        self.shift: Tensor | None = None

    @abstractmethod
    def add(self, rows: Tensor, kept: Int[Tensor, " n"] | None) -> Iterator[Block]:
        """Take `rows`, or those with the indices `kept`, and yield the blocks that are now full.

        A block is valid until the next one is requested.
        """

    @abstractmethod
    def rest(self) -> Iterator[Block]:
        """Yield the rows that still wait. No rows can be added afterwards."""

    def _shifted(self, rows: Tensor, out: Tensor) -> Tensor:
        if self.shift is None:
            self.shift = rows.mean(0, dtype=self.dtype)
        return torch.sub(rows, self.shift, out=out)


def row_blocks(width: int, device: torch.device, dtype: torch.dtype) -> RowBlocks:
    """Return empty blocks of the kind that suits the device."""
    kind = CachedBlocks if device.type == "cpu" else LargeBlocks
    return kind(width, device, dtype)


class CachedBlocks(RowBlocks):
    """Rows are copied into one block of `ROWS` rows, which stays in a core's cache.

    Masking, shifting and conversion happen during the copy. Small batches are multiplied as fast
    as large ones.
    """

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width, device, dtype)
        self._block = torch.empty(ROWS, width, dtype=dtype, device=device)
        self._filled = 0
        self._sixteen_bits = True

    def add(self, rows: Tensor, kept: Int[Tensor, " n"] | None) -> Iterator[Block]:
        count = len(rows) if kept is None else len(kept)
        start = 0
        while start < count:
            end = min(count, start + ROWS - self._filled)
            some = rows[start:end] if kept is None else rows[kept[start:end]]
            filled = self._filled + len(some)
            self._shifted(some, self._block[self._filled : filled])
            self._sixteen_bits &= is_narrow(rows.dtype)
            self._filled, start = filled, end
            if filled == ROWS:
                yield from self._full()

    def rest(self) -> Iterator[Block]:
        yield from self._full()
        del self._block

    def _full(self) -> Iterator[Block]:
        if self._filled:
            yield Block(self._block[: self._filled], self._sixteen_bits)
        self._filled, self._sixteen_bits = 0, True


class LargeBlocks(RowBlocks):
    """All rows of a batch at once, without a copy; a small batch waits for the next one."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width, device, dtype)
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor, kept: Int[Tensor, " n"] | None) -> Iterator[Block]:
        if kept is not None:
            rows = rows[kept]
        if not len(rows):
            return
        if self.shift is None:
            self.shift = rows.mean(0, dtype=self.dtype)
        waiting = sum(part.nbytes for part in self._waiting) + rows.nbytes
        if waiting < WAITING_BYTES * self.width:
            # A view would keep the whole activation, and would see later writes to it.
            self._waiting.append(rows.clone() if kept is None else rows)
            return
        yield from self._blocks([*self._waiting, rows])
        self._waiting.clear()

    def rest(self) -> Iterator[Block]:
        if self._waiting:
            yield from self._blocks(self._waiting)
        self._waiting.clear()

    def _blocks(self, parts: list[Tensor]) -> Iterator[Block]:
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        for chunk in rows.tensor_split(-(-len(rows) // LARGEST_BLOCK)):
            shifted = torch.empty(chunk.shape, dtype=self.dtype, device=self.device)
            yield Block(self._shifted(chunk, shifted), is_narrow(rows.dtype))
