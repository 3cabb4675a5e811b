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

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_init.linalg.mixed_products import SIXTEEN_BITS, add_product

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
