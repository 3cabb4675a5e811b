"""Moments of a layer's inputs with their principal directions, and the sketch of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.linalg.gram import ROWS
from lora_init.linalg.precision import full_precision, wide

SMALLEST_DECOMPOSITION = 32

Components = tuple[Float[Tensor, " rank"], Float[Tensor, "in rank"], Float[Tensor, ""]]
"""Top variances (descending), their directions (columns), and the total variance."""


@dataclass
class InputStatistics:
    """Mean and covariance of one input tensor, shared by all layers that read it.

    Attributes:
        covariance: sum (x - mean)(x - mean)ᵀ / tokens, in float32, or in float64 with
            `CalibrationRequest.smallest`.
        mean: sum x / tokens, float64.
        tokens: the number of rows.
    """

    covariance: Float[Tensor, "in in"]
    mean: Float[Tensor, " in"]
    tokens: int
    _components: dict[tuple[bool, int], Components] = field(default_factory=dict, repr=False)
    _least: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of_rows(cls, rows: Float[Tensor, "tokens in"]) -> InputStatistics:
        """The moments of `rows`, computed in float64; the covariance is rounded to float32."""
        exact = wide(rows.detach())
        mean = exact.mean(0)
        centered = exact - mean
        return cls((centered.T @ centered / len(rows)).float(), mean, len(rows))

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def second_moment(self) -> Float[Tensor, "in in"]:
        """sum x xᵀ / tokens, uncentered; float64, as a large mean would hide the covariance."""
        wide = self.covariance.double()
        # In place if `wide` is a copy, to save memory: these matrices are large.
        add = torch.addr if wide is self.covariance else Tensor.addr_
        return add(wide, self.mean, self.mean)

    def principal_components(self, rank: int, center: bool) -> Components:
        """Top `rank` variances (descending), their directions, and the total variance.

        The result is cached for other layers with this input and for a rank allocator. The
        decomposed size is rounded up to a power of two. LAPACK's last bits depend on the number of
        vectors, and the result for a layer must not depend on what other layers request.
        """
        size = decomposed_size(rank, len(self.mean))
        if (center, size) not in self._components:
            matrix = self.matrix(center)
            self.keep(center, size, matrix, *linalg.top_eigen(matrix, size))
        return leading(self._components[center, size], rank)

    def has_components(self, center: bool, size: int) -> bool:
        """Whether a decomposition of this size is cached."""
        return (center, size) in self._components

    def matrix(self, center: bool) -> Float[Tensor, "in in"]:
        """The covariance, or the second moment for `center=False`."""
        return self.covariance if center else self.second_moment

    def keep(self, center: bool, size: int, matrix: Tensor, values: Tensor, vectors: Tensor):
        """Cache the decomposition of `matrix(center)` for `principal_components`."""
        total = matrix.diagonal().sum().clamp_min(0)
        self._components[center, size] = values.clamp_min(0).float(), vectors.float(), total.float()

    def least_directions(self, rank: int) -> Float[Tensor, "in rank"]:
        """The last `rank` eigenvectors of `second_moment`, ascending, in float64.

        The result is cached, and its size rounded up, as in `principal_components`.
        """
        size = linalg.nesting_rank(rank, len(self.mean))
        if size not in self._least:
            self._least[size] = linalg.bottom_eigen(self.second_moment, size)[1]
        return self._least[size][:, :rank]

    def condensed(self, rank: int) -> LeadingComponents:
        """The results of `principal_components` up to `rank`, without the covariance matrix."""
        components = {center: self.principal_components(rank, center) for center in (True, False)}
        return LeadingComponents(
            {center: converted(found, Tensor.clone) for center, found in components.items()}
        )

    def to(self, device: torch.device) -> InputStatistics:
        """The moments on `device`, with the cached decompositions."""
        components = {
            key: converted(found, lambda part: part.to(device))
            for key, found in self._components.items()
        }
        kept = {size: vectors.to(device) for size, vectors in self._least.items()}
        return InputStatistics(
            self.covariance.to(device), self.mean.to(device), self.tokens, components, kept
        )


@dataclass(frozen=True)
class InputSets:
    """The input moments of a layer, or of a stack, on several calibration sets.

    ``inputs["learn"]`` has the moments of the set with that name.

    Attributes:
        sets: the moments by the name of the set: `InputStatistics`, `LeadingComponents` or
            `StackedInputs`.
    """

    sets: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.sets[name]

    @property
    def device(self) -> torch.device:
        return next(iter(self.sets.values())).device

    @property
    def members(self) -> list[InputSets]:
        """The moments of each layer of a stack."""
        parts = [found.members for found in self.sets.values()]
        return [
            InputSets(dict(zip(self.sets, one, strict=True))) for one in zip(*parts, strict=True)
        ]

    def condensed(self, rank: int) -> InputSets:
        """Like `InputStatistics.condensed`, for every set."""
        return InputSets({name: found.condensed(rank) for name, found in self.sets.items()})

    def to(self, device: torch.device) -> InputSets:
        return InputSets({name: found.to(device) for name, found in self.sets.items()})


@dataclass(frozen=True)
class StackedInputs:
    """The input moments of a stack of layers, or of the groups of a convolution.

    Layers with the same input share one member.

    Attributes:
        members: `InputStatistics`, or `LeadingComponents` after `condensed`.
    """

    members: Sequence[Any]

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @property
    def tokens(self) -> int:
        """The number of rows of each group; all groups of a convolution have the same."""
        return self.members[0].tokens

    @property
    def mean(self) -> Float[Tensor, "*stack in"]:
        """The means of all members, float64."""
        return torch.stack([one.mean for one in self.members])

    @property
    def second_moment(self) -> Float[Tensor, "*stack in in"]:
        return torch.stack([one.second_moment for one in self.members])

    def least_directions(self, rank: int) -> Float[Tensor, "*stack in rank"]:
        """Like `InputStatistics.least_directions`; distinct inputs are decomposed together."""
        size = linalg.nesting_rank(rank, len(self.members[0].mean))
        waiting = {id(one): one for one in self.members if size not in one._least}
        if waiting:
            moments = torch.stack([one.second_moment for one in waiting.values()])
            found = linalg.bottom_eigen(moments, size)[1]
            for one, vectors in zip(waiting.values(), found, strict=True):
                one._least[size] = vectors
        return torch.stack([one.least_directions(rank) for one in self.members])

    def condensed(self, rank: int) -> StackedInputs:
        """Like `InputStatistics.condensed`, for every member."""
        return StackedInputs([one.condensed(rank) for one in self.members])

    def to(self, device: torch.device) -> StackedInputs:
        return StackedInputs([one.to(device) for one in self.members])


@dataclass(frozen=True)
class LeadingComponents:
    """Principal components without the covariance: n · rank numbers instead of n².

    Attributes:
        components: the components by `center`, whether the mean is subtracted.
    """

    components: Mapping[bool, Components]

    @property
    def device(self) -> torch.device:
        return self.components[True][0].device

    def principal_components(self, rank: int, center: bool) -> Components:
        """Like `InputStatistics.principal_components`, up to the stored rank."""
        return leading(self.components[center], rank)

    def to(self, device: torch.device) -> LeadingComponents:
        parts = {
            center: converted(found, lambda part: part.to(device))
            for center, found in self.components.items()
        }
        return LeadingComponents(parts)


@dataclass(frozen=True)
class GradientSketch:
    """The leading singular triplets of a gradient G that does not fit into memory.

    Attributes:
        left, values, right: U (out, k), S (k,) descending and V (in, k); G ≈ U S Vᵀ.
    """

    left: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "in k"]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dense(self) -> Float[Tensor, "out in"]:
        """U S Vᵀ in float32."""
        with full_precision():
            return (self.left * self.values) @ self.right.mT

    def to(self, device: torch.device) -> GradientSketch:
        return GradientSketch(*(part.to(device) for part in (self.left, self.values, self.right)))


def sums_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes that a calibration needs per input: the second moment and a block of rows."""
    return dtype.itemsize * (width**2 + ROWS * width)


def decomposed_size(rank: int, width: int) -> int:
    """The number of components to compute for a request of `rank`."""
    return linalg.nesting_rank(max(rank, SMALLEST_DECOMPOSITION), width)


def decompose_together(
    inputs: Sequence[InputStatistics], rank: int, center: bool, *, memory: int
) -> None:
    """Compute the principal components of inputs of one width, in stacks.

    Each input caches its result for `principal_components`.

    Args:
        inputs: inputs of one width on one accelerator.
        rank: the requested number of components.
        center: whether to subtract the mean.
        memory: bytes for the float64 matrices of one stack; a single matrix may exceed it.
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


def converted(components: Components, convert: Callable[[Tensor], Tensor]) -> Components:
    """The components with `convert` applied to each of their tensors."""
    values, vectors, total = components
    return convert(values), convert(vectors), convert(total)


def leading(components: tuple[Tensor, Tensor, Tensor], rank: int) -> Components:
    """The first `rank` components, and the total variance."""
    values, vectors, total = components
    return values[:rank], vectors[:, :rank], total
