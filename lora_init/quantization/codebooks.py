"""The values that codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

# bitsandbytes' constants. They are the quantiles of `normal_float_table(4)` rounded elsewhere, so
# computing them would move a few codes.
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
# Of the code's bits: sign, two of exponent, one of mantissa. The largest, 12, is scaled to 1.
FP4_UNSCALED = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# From -1 to 1. Of the two codes for zero, bitsandbytes gives 8 to small positive values.
FP4_ASCENDING = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


# Tables are cached, so they must not depend on the default dtype and device of the first caller.
def _float32(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _linspace64(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float64, device="cpu")


@cache
def table_of(kind: str, bits: int) -> Tensor:
    if kind == "nf4":
        return _float32(NF4_TABLE)
    if kind == "fp4":
        return _float32([*FP4_UNSCALED, *(-value for value in FP4_UNSCALED)]) / 12
    if kind == "nf2":
        return normal_float_table(2)
    return torch.linspace(-1, 1, 2**bits, dtype=torch.float32, device="cpu")


def normal_float_table(
    bits: int, *, symmetric: bool = False, offset: float = 0.9677083
) -> Float[Tensor, " codes"]:
    """Return the NormalFloat values: quantiles of N(0, 1) at even probabilities, scaled to max 1.

    Asymmetric (the default of QLoRA and LoftQ): 2^(bits-1) positive values, 0, and
    2^(bits-1) - 1 negative ones, so that 0 is exact. Symmetric: the means of neighbouring
    quantiles, none of them 0.

    Args:
        bits: 2^bits values.
        offset: the outermost probability; 1 would put the last value at infinity.
    """
    half = 2 ** (bits - 1)

    def quantiles(first: float, last: float, count: int) -> Tensor:
        return torch.special.ndtri(_linspace64(first, last, count))

    if symmetric:
        edges = quantiles(1 - offset, offset, 2 * half + 1)
        values = (edges[1:] + edges[:-1]) / 2
    else:
        # Both series start at the offset and end before the median, which is the 0 between them.
        positive = quantiles(offset, 0.5, half + 1)[:-1]
        negative = -quantiles(offset, 0.5, half)[:-1]
        values = torch.cat([negative, positive.new_zeros(1), positive])
    values = values.sort().values
    return (values / values.max()).float()


@cache
def dynamic_table() -> Float[Tensor, " codes"]:
    """Return the ascending 8-bit values that `double` gives to scales: bitsandbytes' dynamic map.

    ±10^(i-6) times the 2^i middles of even steps from 0.1 to 1, i = 0 … 6; and 0 and 1. So small
    values keep a small relative error (Dettmers et al. 2021, 8-bit optimizers).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = (10 ** (i - 6) * ((edges[1:] + edges[:-1]) / 2)).tolist()
        values += middles + [-middle for middle in middles]
    return _float32(sorted(values))


def midpoints(ascending: Float[Tensor, " codes"]) -> Float[Tensor, " codes-1"]:
    """A value lies nearest to the entry whose pair of midpoints encloses it: one sorted look-up,
    and no (numel, table) array of distances.
    """
    return (ascending[1:] + ascending[:-1]) / 2


LARGEST_GRID = 1 << 16


@dataclass(frozen=True)
class Grid:
    """Boundaries laid out in cells.

    Attributes:
        below: how many boundaries lie in the cells before this one.
        boundary: the one in this cell, or infinity.
    """

    below: Int[Tensor, " cells"]
    boundary: Float[Tensor, " cells"]

    @classmethod
    def of(cls, boundaries: Float[Tensor, " count"]) -> Grid:
        """The coarsest grid for these ascending boundaries within [-1, 1].

        Raises:
            ValueError: two of them are too near to each other.
        """
        cells = 2
        while (places := _cells(boundaries, cells)).unique().numel() < len(boundaries):
            cells *= 2
            if cells > LARGEST_GRID:
                raise ValueError(f"boundaries nearer than {2 / LARGEST_GRID}: {boundaries}")
        counts = torch.bincount(places, minlength=cells)
        boundary = boundaries.new_full((cells,), torch.inf)
        boundary[places] = boundaries
        return cls((counts.cumsum(0) - counts).to(torch.int32), boundary)

    def to(self, device: torch.device) -> Grid:
        return Grid(self.below.to(device), self.boundary.to(device))

    def find(self, values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """How many boundaries are smaller than each value, int32."""
        flat = values.reshape(-1)
        cells = _cells(flat, len(self.below))
        found = self.below.index_select(0, cells)
        found += flat > self.boundary.index_select(0, cells)
        return found.view(values.shape)


def _cells(values: Tensor, count: int) -> Tensor:
    # Clamped again as integers: what a NaN becomes is undefined, but it is an integer.
    places = values.clamp(-1.0, 1.0).add_(1.0).mul_(count / 2)
    return places.to(torch.int32).clamp_(0, count - 1)
