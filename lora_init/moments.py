"""First and second moments of one layer's inputs, accumulated in one pass, and their directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg

SMALLEST_DECOMPOSITION = 32


@dataclass
class InputStatistics:
    """Moments of one distinct input. Shared by all layers that read it.

    Attributes:
        covariance: sum (x - mean)(x - mean)ᵀ / tokens.
        mean: sum x / tokens, float64.
        tokens: how many rows were counted.
    """

    covariance: Float[Tensor, "in in"]
    mean: Float[Tensor, " in"]
    tokens: int
    _components: dict[tuple[bool, int], tuple] = field(default_factory=dict, repr=False)

    @classmethod
    def of_rows(cls, rows: Float[Tensor, "tokens in"]) -> InputStatistics:
        """The moments of inputs at hand, without a model: for tests and experiments."""
        sums = RunningMoments(rows.float())
        sums.add(rows.float())
        return cls(*sums.moments(), len(rows))

    @property
    def second_moment(self) -> Float[Tensor, "in in"]:
        """sum x xᵀ / tokens, uncentred, in float64: a large mean would drown the covariance."""
        return self.covariance.double() + torch.outer(self.mean, self.mean)

    def principal_components(
        self, rank: int, center: bool
    ) -> tuple[Float[Tensor, " rank"], Float[Tensor, "in rank"], Float[Tensor, ""]]:
        """Top `rank` variances (descending), their directions, and the total variance.

        Kept, so that the layers sharing this input, and an allocator before them, pay once. What is
        decomposed is rounded up to a power of two: LAPACK's last bits depend on how many vectors it
        is asked for, and a layer's may not depend on what the others asked for.
        """
        size = min(len(self.mean), max(SMALLEST_DECOMPOSITION, 1 << (rank - 1).bit_length()))
        if (center, size) not in self._components:
            matrix = self.covariance if center else self.second_moment
            values, vectors = linalg.top_eigen(matrix, size)
            total = matrix.diagonal().sum().clamp_min(0)
            figures = (values.clamp_min(0), vectors, total)
            self._components[center, size] = tuple(figure.float() for figure in figures)
        values, vectors, total = self._components[center, size]
        return values[:rank], vectors[:, :rank], total


class RunningMoments:
    """Moments of the rows added so far, about a shift near their mean.

    Sums about zero would lose a variance that is small beside the squared mean, as it is behind
    many activation functions. The shift is the first batch's mean.
    """

    def __init__(self, rows: Float[Tensor, "tokens in"]) -> None:
        width = rows.shape[-1]
        self.shift = rows.mean(0) if len(rows) else rows.new_zeros(width)
        self.products = rows.new_zeros(width, width)
        self.total = rows.new_zeros(width, dtype=torch.float64)
        self.tokens = 0

    def add(self, rows: Float[Tensor, "tokens in"]) -> None:
        rows = rows - self.shift
        self.products.addmm_(rows.T, rows)
        self.total += rows.sum(0, dtype=torch.float64)
        self.tokens += len(rows)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Covariance and mean."""
        offset = self.total / self.tokens
        covariance = self.products / self.tokens - torch.outer(offset, offset).float()
        return covariance, self.shift.double() + offset


def join(parts: Sequence[RunningMoments]) -> InputStatistics:
    """The moments of several groups of rows together, by the rule for the variance of groups."""
    parts = [part for part in parts if part.tokens]
    tokens = sum(part.tokens for part in parts)
    moments = [part.moments() for part in parts]
    if len(parts) == 1:
        return InputStatistics(*moments[0], tokens)
    shares = [part.tokens / tokens for part in parts]
    mean = sum(share * centre for share, (_, centre) in zip(shares, moments, strict=True))
    covariance = sum(
        share * (inner + torch.outer(centre - mean, centre - mean).float())
        for share, (inner, centre) in zip(shares, moments, strict=True)
    )
    return InputStatistics(covariance, mean, tokens)
