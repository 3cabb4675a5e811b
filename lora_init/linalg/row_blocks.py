"""Blocks of rows, shifted and converted, of the size at which a device multiplies them fast.

Sums about zero would lose a variance that is small compared with the squared mean, as it is behind
many activation functions. So rows are taken about a shift near their mean, the mean of the first
ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_init.linalg.product_sum import SIXTEEN_BITS

ROWS = 512
"""Rows of a block on a CPU."""

WAITING_BYTES = 4 * ROWS
"""Of each column, for rows that wait on an accelerator: 1024 rows of 16 bits, 512 of float32."""

LARGEST_BLOCK = 4096
"""Rows of a block on an accelerator, which bounds the memory of the converted copy."""


@dataclass(frozen=True)
class Block:
    """Some rows that are multiplied at once.

    Attributes:
        rows: minus the shift, in the dtype of the sums.
        sixteen_bits: whether the model computed them in 16 bits.
    """

    rows: Float[Tensor, "rows in"]
    sixteen_bits: bool


class RowBlocks(ABC):
    """Rows that arrive in pieces of any size and leave as blocks.

    Args:
        width: of a row.
        device: of the rows.
        dtype: of the blocks.
    """

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self.width, self.device, self.dtype = width, device, dtype
        self.shift: Tensor | None = None

    @abstractmethod
    def add(self, rows: Tensor, kept: Int[Tensor, " n"] | None) -> Iterator[Block]:
        """Take `rows`, or those with the indices `kept`; the blocks that are full now.

        A block is valid until the next one is asked for.
        """

    @abstractmethod
    def rest(self) -> Iterator[Block]:
        """The rows that still wait; none can be added after."""

    def _note_shift(self, rows: Tensor) -> None:
        if self.shift is None:
            self.shift = rows.mean(0, dtype=self.dtype)


def row_blocks(width: int, device: torch.device, dtype: torch.dtype) -> RowBlocks:
    """Empty blocks of the kind that suits the device."""
    kind = CachedBlocks if device.type == "cpu" else LargeBlocks
    return kind(width, device, dtype)


class CachedBlocks(RowBlocks):
    """One block of ROWS rows, which stays in a core's cache.

    Rows are shifted, converted and freed of masked ones while they are copied into it: memory is
    read once and not written, and small batches are multiplied at the rate of large ones.
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
            self._copy(rows[start:end] if kept is None else rows[kept[start:end]])
            start = end
            if self._filled == ROWS:
                yield from self._full()

    def rest(self) -> Iterator[Block]:
        yield from self._full()
        del self._block

    def _copy(self, rows: Tensor) -> None:
        self._note_shift(rows)
        filled = self._filled + len(rows)
        torch.sub(rows, self.shift, out=self._block[self._filled : filled])
        self._filled = filled
        self._sixteen_bits &= rows.dtype in SIXTEEN_BITS

    def _full(self) -> Iterator[Block]:
        if self._filled:
            yield Block(self._block[: self._filled], self._sixteen_bits)
        self._filled, self._sixteen_bits = 0, True


class LargeBlocks(RowBlocks):
    """All rows of a batch at once, without a copy of them; fewer wait for the next batch."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width, device, dtype)
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor, kept: Int[Tensor, " n"] | None) -> Iterator[Block]:
        if kept is not None:
            rows = rows[kept]
        if not len(rows):
            return
        self._note_shift(rows)
        waiting = sum(part.nbytes for part in self._waiting) + rows.nbytes
        if waiting < WAITING_BYTES * self.width:
            # A view would keep the whole activation, and see what is written to it later.
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
        sixteen_bits = rows.dtype in SIXTEEN_BITS
        count = -(-len(rows) // LARGEST_BLOCK)
        for chunk in rows.tensor_split(count):
            shifted = torch.empty(chunk.shape, dtype=self.dtype, device=self.device)
            torch.sub(chunk, self.shift, out=shifted)
            yield Block(shifted, sixteen_bits)
