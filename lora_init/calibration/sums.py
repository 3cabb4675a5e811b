"""Running first and second moments of rows that arrive in pieces of any size.

Rows are summed about a shift, in blocks whose size depends on the device
(`lora_init.linalg.gram`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_init.distributed import over_ranks, rank_count
from lora_init.linalg.gram import (
    ROWS,
    Block,
    accumulate_gram,
    accumulate_gram_of_parts,
    mirror,
    row_blocks,
    two_parts,
)
from lora_init.linalg.mixed_products import Support, mixed_support
from lora_init.linalg.precision import full_precision


@dataclass(frozen=True)
class Moments:
    """First and second moments of a group of rows, which can be merged with other groups.

    Attributes:
        tokens: number of rows.
        mean: sum x / tokens, float64; zero without rows.
        products: C = sum (x - mean)(x - mean)ᵀ / tokens.
        variance: trace C, float64.
    """

    tokens: int
    mean: Float[Tensor, " in"]
    products: Float[Tensor, "in in"]
    variance: Float[Tensor, ""]

    def about(self, center: Float[Tensor, " in"]) -> tuple[Tensor, Tensor]:
        """`products` and `variance` about `center` instead of the mean."""
        offset = self.mean - center
        shift = offset.to(self.products)
        products = torch.addr(self.products, shift, shift)
        return products, self.variance + offset.square().sum()


def joined(parts: Sequence[Moments]) -> Moments:
    """Merge the moments of several groups of rows (parallel variance formula)."""
    if len(parts) == 1:
        return parts[0]
    tokens = sum(part.tokens for part in parts)
    shares = [part.tokens / tokens for part in parts]
    mean = reduce(torch.add, (share * part.mean for share, part in zip(shares, parts, strict=True)))
    moved = [(share, *part.about(mean)) for share, part in zip(shares, parts, strict=True)]
    return Moments(
        tokens,
        mean,
        reduce(torch.add, (share * products for share, products, _ in moved)),
        reduce(torch.add, (share * variance for share, _, variance in moved)),
    )


def joined_over_ranks(own: Moments) -> Moments:
    """Merge the moments of all ranks, summed in float64. Ranks may have no rows."""
    if rank_count() == 1:
        return own
    first = over_ranks(torch.cat([own.mean.new_tensor([own.tokens]), own.tokens * own.mean]))
    if first[0] == 0:
        return own
    tokens, mean = int(first[0]), first[1:] / first[0]
    products, variance = own.about(mean)
    # Few rows at a time: all of them in float64 would double the memory of a layer.
    for rows in products.split(ROWS):
        rows.copy_(over_ranks(own.tokens * rows.double()) / tokens)
    return Moments(tokens, mean, products, over_ranks(own.tokens * variance) / tokens)


class RunningMoments:
    """Sum rows and their products about a shift near the mean.

    For a 16-bit model on a GPU that adds bfloat16 products in float32, the shifted rows are split
    into two bfloat16 parts. The relative error is then 2^-17 per number and 2^-15 per product.

    Args:
        width: number of features of a row.
        device: where the sums are stored.
        dtype: dtype of the products, float32 or float64.
    """

    def __init__(
        self, width: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.tokens = 0
        self._total = torch.zeros(width, dtype=torch.float64, device=device)
        self._blocks = row_blocks(width, device, dtype)
        self._gram = torch.zeros(width, width, dtype=dtype, device=device)
        fast = mixed_support(device, torch.bfloat16) is not Support.NONE
        self._in_parts = fast and dtype == torch.float32

    @property
    def device(self) -> torch.device:
        return self._total.device

    def add(self, rows: Float[Tensor, "rows in"], kept: Int[Tensor, " n"] | None = None) -> None:
        """Add `rows`, of any float dtype and device, or only those with the indices `kept`."""
        if rows.device != self.device:  # one copy for all blocks
            rows = (rows if kept is None else rows[kept]).to(self.device)
            kept = None
        for block in self._blocks.add(rows, kept):
            self._multiply(block)

    def _multiply(self, block: Block) -> None:
        self._total += block.rows.sum(0)
        with full_precision():
            if self._in_parts and block.sixteen_bits:
                accumulate_gram_of_parts(self._gram, *two_parts(block.rows))
            else:
                accumulate_gram(self._gram, block.rows)
        self.tokens += len(block.rows)

    @cached_property
    def moments(self) -> Moments:
        """The moments of all rows. No row can be added afterwards."""
        for block in self._blocks.rest():
            self._multiply(block)
        offset = self._total / max(self.tokens, 1)
        shift = self._blocks.shift
        mean = offset if shift is None else shift + offset
        covariance = self._gram.div_(max(self.tokens, 1))
        mirror(covariance)
        offset = offset.to(covariance)
        covariance.addr_(offset, offset, alpha=-1)
        return Moments(self.tokens, mean, covariance, covariance.diagonal().sum().double())
