"""Memory for the sums of one calibration pass: what each input takes, and how many fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.calibration.sketch import RunningSketch, SketchedStatistics, random_basis
from lora_init.calibration.sums import Moments, RunningMoments, RunningSums
from lora_init.moments import InputStatistics
from lora_init.registry import CalibrationRequest


def sums_dtype(requests: Iterable[CalibrationRequest]) -> torch.dtype:
    """In which one pass sums the inputs for all of these."""
    precise = any(request.smallest for request in requests)
    return torch.float64 if precise else torch.float32


@dataclass
class Budget:
    """Makes the sums of distinct inputs, as many as fit.

    Attributes:
        memory: in bytes, for all sums together; None is unlimited.
        columns: of a sketch; None, and inputs no wider, are summed exactly.
        dtype: of exact sums.
        used: bytes of the sums made so far.
    """

    memory: int | None = None
    columns: int | None = None
    dtype: torch.dtype = torch.float32
    used: int = 0
    _bases: dict[tuple, Float[Tensor, "in columns"]] = field(default_factory=dict, repr=False)

    def bytes(self, width: int) -> int:
        """What the sums of one input of this width take."""
        if self._sketches(width):
            return RunningSketch.bytes(width, self.columns)
        return RunningMoments.bytes(width, self.dtype)

    def admits(self, width: int) -> bool:
        """Whether one more input fits; then it counts."""
        if self.memory is not None and self.used + self.bytes(width) > self.memory:
            return False
        self.used += self.bytes(width)
        return True

    def sums(self, width: int, device: torch.device) -> RunningSums:
        """Empty sums."""
        if not self._sketches(width):
            return RunningMoments(width, device, self.dtype)
        if (width, device) not in self._bases:
            self._bases[width, device] = random_basis(width, self.columns, device)
        return RunningSketch(self._bases[width, device])

    def _sketches(self, width: int) -> bool:
        return self.columns is not None and width > self.columns


def statistics_of(moments: Moments) -> InputStatistics | SketchedStatistics:
    """What sums of either kind say of the inputs."""
    if moments.basis is not None:
        return SketchedStatistics.of(moments)
    return InputStatistics(moments.products, moments.mean, moments.tokens)
