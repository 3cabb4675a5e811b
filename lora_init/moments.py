"""First and second moments of a layer's inputs, and their principal directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.linalg.gram import ROWS

SMALLEST_DECOMPOSITION = 32

Components = tuple[Float[Tensor, " rank"], Float[Tensor, "in rank"], Float[Tensor, ""]]
"""Top variances (descending), their directions (columns), and the total variance."""


@dataclass
class InputStatistics:
    """Moments of one distinct input. Shared by all layers that read it.

    Attributes:
        covariance: sum (x - mean)(x - mean)ᵀ / tokens, float32; float64 where the method asks for
            that (`CalibrationRequest.smallest`).
        mean: sum x / tokens, float64.
        tokens: how many rows were counted.
    """

    covariance: Float[Tensor, "in in"]
    mean: Float[Tensor, " in"]
    tokens: int
    _components: dict[tuple[bool, int], Components] = field(default_factory=dict, repr=False)
    _least: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of_rows(cls, rows: Float[Tensor, "tokens in"]) -> InputStatistics:
        """The moments of rows in memory, computed in float64 and rounded once."""
        wide = rows.detach().double()
        mean = wide.mean(0)
        centered = wide - mean
        return cls((centered.T @ centered / len(rows)).float(), mean, len(rows))

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def second_moment(self) -> Float[Tensor, "in in"]:
        """sum x xᵀ / tokens, uncentred, in float64: a large mean would drown the covariance."""
        wide = self.covariance.double()
        # In place where that was a copy: these are as large as anything an initializer holds.
        add = torch.addr if wide is self.covariance else Tensor.addr_
        return add(wide, self.mean, self.mean)

    def principal_components(self, rank: int, center: bool) -> Components:
        """Top `rank` variances (descending), their directions, and the total variance.

        Kept, so that the layers sharing this input, and an allocator before them, pay once. What is
        decomposed is rounded up to a power of two: LAPACK's last bits depend on how many vectors it
        is asked for, and a layer's may not depend on what the others asked for.
        """
        size = decomposed_size(rank, len(self.mean))
        if (center, size) not in self._components:
            matrix = self.matrix(center)
            self.keep(center, size, matrix, *linalg.top_eigen(matrix, size))
        return leading(self._components[center, size], rank)

    def has_components(self, center: bool, size: int) -> bool:
        """Whether a decomposition of this size is kept."""
        return (center, size) in self._components

    def matrix(self, center: bool) -> Float[Tensor, "in in"]:
        """The covariance, or with `center=False` the second moment."""
        return self.covariance if center else self.second_moment

    def keep(self, center: bool, size: int, matrix: Tensor, values: Tensor, vectors: Tensor):
        """Keep the decomposition of `matrix(center)` for `principal_components`."""
        total = matrix.diagonal().sum().clamp_min(0)
        figures = (values.clamp_min(0), vectors, total)
        self._components[center, size] = tuple(figure.float() for figure in figures)

    def least_directions(self, rank: int) -> Float[Tensor, "in rank"]:
        """The last `rank` eigenvectors of `second_moment`, the least of all first, in float64.

        Kept, and rounded up, like `principal_components`.
        """
        size = linalg.nesting_rank(rank, len(self.mean))
        if size not in self._least:
            self._least[size] = linalg.bottom_eigen(self.second_moment, size)[1]
        return self._least[size][:, :rank]

    def condensed(self, rank: int) -> LeadingComponents:
        """What `principal_components` gives for ranks up to `rank`, without the covariance."""
        components = {center: self.principal_components(rank, center) for center in (True, False)}
        return LeadingComponents(
            {center: tuple(part.clone() for part in found) for center, found in components.items()}
        )

    def to(self, device: torch.device) -> InputStatistics:
        """The same on another device, with the decompositions that are kept."""
        components = {
            key: tuple(part.to(device) for part in found) for key, found in self._components.items()
        }
        kept = {size: vectors.to(device) for size, vectors in self._least.items()}
        return InputStatistics(
            self.covariance.to(device), self.mean.to(device), self.tokens, components, kept
        )


@dataclass(frozen=True)
class StackedInputs:
    """The inputs of layers of one shape, for a method that works on a stack of them.

    Layers that share their inputs share their statistics, too.
    """

    members: Sequence[InputStatistics]

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @property
    def second_moment(self) -> Float[Tensor, "*stack in in"]:
        return torch.stack([one.second_moment for one in self.members])

    def least_directions(self, rank: int) -> Float[Tensor, "*stack in rank"]:
        """As of `InputStatistics`; distinct inputs are decomposed together."""
        size = linalg.nesting_rank(rank, len(self.members[0].mean))
        waiting = {id(one): one for one in self.members if size not in one._least}
        if waiting:
            moments = torch.stack([one.second_moment for one in waiting.values()])
            found = linalg.bottom_eigen(moments, size)[1]
            for one, vectors in zip(waiting.values(), found, strict=True):
                one._least[size] = vectors
        return torch.stack([one.least_directions(rank) for one in self.members])


@dataclass(frozen=True)
class LeadingComponents:
    """Principal components alone: n · rank numbers where the covariance has n².

    Attributes:
        components: by whether the mean is subtracted.
    """

    components: Mapping[bool, Components]

    @property
    def device(self) -> torch.device:
        return self.components[True][0].device

    def principal_components(self, rank: int, center: bool) -> Components:
        """As of `InputStatistics`, up to the rank that was kept."""
        return leading(self.components[center], rank)

    def to(self, device: torch.device) -> LeadingComponents:
        parts = {
            center: tuple(part.to(device) for part in found)
            for center, found in self.components.items()
        }
        return LeadingComponents(parts)


def sums_bytes(width: int, dtype: torch.dtype) -> int:
    """Memory of the sums of one input during a calibration: all products, and a block of rows."""
    return dtype.itemsize * (width**2 + ROWS * width)


def decomposed_size(rank: int, width: int) -> int:
    """How many components are computed where `rank` of them are asked for."""
    return linalg.nesting_rank(max(rank, SMALLEST_DECOMPOSITION), width)


def decompose_together(
    inputs: Sequence[InputStatistics], rank: int, center: bool, *, memory: int
) -> None:
    """Compute the principal components of inputs of one width, as stacks on an accelerator.

    Each of them keeps the result for `principal_components`.

    Args:
        memory: in bytes, of the float64 matrices of one stack; one matrix may exceed it.
    """
    width = len(inputs[0].mean)
    size = decomposed_size(rank, width)
    waiting = [one for one in inputs if not one.has_components(center, size)]
    together = max(1, memory // (8 * width**2))
    for first in range(0, len(waiting), together):
        some = waiting[first : first + together]
        matrices = torch.stack([one.matrix(center) for one in some])
        for one, matrix, values, vectors in zip(
            some, matrices, *linalg.top_eigen(matrices, size), strict=True
        ):
            one.keep(center, size, matrix, values, vectors)


def leading(components: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` of all components."""
    values, vectors, total = components
    return values[:rank], vectors[:, :rank], total
