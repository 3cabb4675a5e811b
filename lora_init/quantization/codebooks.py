"""The values that codes stand for, and the search for the nearest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

# bitsandbytes' constants. They are the quantiles of `normal_float_table(4)` rounded elsewhere:
# computed values would change a few codes.
NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# The code's bits are a sign, two bits of exponent and one of mantissa. The largest value becomes 1.
FP4_UNSCALED = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# The codes of the values from -1 to 1. bitsandbytes gives code 8, a second zero, to small positive
# values.
FP4_ASCENDING = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)
LARGEST_GRID = 1 << 16


# Tables are cached, so they must not depend on the default dtype and device of the first caller.
def _float32(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _linspace64(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float64, device="cpu")


@cache
def table_of(kind: str, bits: int) -> Float[Tensor, " codes"]:
    """Return the value of each code of a quantizer's kind."""
    if kind == "nf4":
        return _float32(NF4_TABLE)
    if kind == "fp4":
        return _float32([*FP4_UNSCALED, *(-value for value in FP4_UNSCALED)]) / 12
    if kind == "nf2":
        return normal_float_table(2)
    return torch.linspace(-1, 1, 2**bits, dtype=torch.float32, device="cpu")


def normal_float_table(bits: int, *, offset: float = 0.9677083) -> Float[Tensor, " codes"]:
    """Return the NormalFloat values: quantiles of N(0, 1) at even probabilities, scaled to max 1.

    There are 2^(bits-1) positive values, 0, and 2^(bits-1) - 1 negative ones, so that 0 is exact.

    Args:
        bits: 2^bits values.
        offset: the outermost probability; 1 would put the last value at infinity.
    """
    half = 2 ** (bits - 1)

    def quantiles(first: float, last: float, count: int) -> Tensor:
        return torch.special.ndtri(_linspace64(first, last, count))

    # Both series start at the offset and end before the median, which is the 0 between them.
    positive = quantiles(offset, 0.5, half + 1)[:-1]
    negative = -quantiles(offset, 0.5, half)[:-1]
    values = torch.cat([negative, positive.new_zeros(1), positive]).sort().values
    return (values / values.max()).float()


@cache
def dynamic_table() -> Float[Tensor, " codes"]:
    """Return the ascending 8-bit values for quantized scales: bitsandbytes' dynamic map.

    They are ±10^(i-6) times the 2^i middles of even steps from 0.1 to 1, for i = 0 to 6, and 0 and
    1. Small values thus keep a small relative error (Dettmers et al. 2021, 8-bit optimizers).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = (10 ** (i - 6) * ((edges[1:] + edges[:-1]) / 2)).tolist()
        values += middles + [-middle for middle in middles]
    return _float32(sorted(values))


def midpoints(ascending: Float[Tensor, " codes"]) -> Float[Tensor, " codes-1"]:
    """Return the boundaries between the entries of a table, for the search of the nearest one."""
    return (ascending[1:] + ascending[:-1]) / 2


@dataclass(frozen=True)
class Grid:
    """An exact `torch.bucketize` for a few boundaries in [-1, 1], without its search.

    The range is cut into equal cells so small that none holds two boundaries. A value's cell gives
    the number of boundaries below the cell, and one comparison settles the boundary inside it. The
    cell never decreases as a value grows, whatever the rounding, so ties are bucketize's too.

    Attributes:
        below: how many boundaries lie in the cells before this one.
        boundary: the one in this cell, or infinity.
    """

    below: Int[Tensor, " cells"]
    boundary: Float[Tensor, " cells"]

    @classmethod
    def of(cls, boundaries: Float[Tensor, " count"]) -> Grid:
        """Return the coarsest grid for ascending boundaries within [-1, 1].

        Raises:
            ValueError: two of them are too near to each other.
        """
        cells = 2
        while (indices := _cells(boundaries, cells)).unique().numel() < len(boundaries):
            cells *= 2
            if cells > LARGEST_GRID:
                raise ValueError(
                    f"boundaries={boundaries} are not supported: they must lie "
                    f"{2 / LARGEST_GRID} apart. Use torch.bucketize."
                )
        counts = torch.bincount(indices, minlength=cells)
        boundary = boundaries.new_full((cells,), torch.inf)
        boundary[indices] = boundaries
        return cls((counts.cumsum(0) - counts).to(torch.int32), boundary)

    def to(self, device: torch.device) -> Grid:
        """Return the grid on another device."""
        return Grid(self.below.to(device), self.boundary.to(device))

    def find(self, values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return how many boundaries are smaller than each value, as int32."""
        flat = values.reshape(-1)
        cells = _cells(flat, len(self.below))
        found = self.below.index_select(0, cells)
        found += flat > self.boundary.index_select(0, cells)
        return found.view(values.shape)


def _cells(values: Tensor, count: int) -> Tensor:
    # Clamped again as integers: the integer that NaN becomes is undefined.
    indices = values.clamp(-1.0, 1.0).add_(1.0).mul_(count / 2)
    return indices.to(torch.int32).clamp_(0, count - 1)
