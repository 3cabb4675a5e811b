"""The memory for the sums of one calibration pass: what an input takes, and how many inputs fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_init.calibration.sums import Moments, RunningMoments
from lora_init.moments import InputStatistics, sums_bytes


@dataclass
class Budget:
    """Creates the sums of distinct inputs, as many as fit.

    Attributes:
        memory: in bytes, for all sums together; None is unlimited.
        dtype: of the sums.
        used: bytes of the sums created so far.
    """

    memory: int | None = None
    dtype: torch.dtype = torch.float32
    used: int = 0

    def admits(self, width: int) -> bool:
        """Whether one more input of this width fits; if so, its bytes are counted."""
        size = sums_bytes(width, self.dtype)
        if self.memory is not None and self.used + size > self.memory:
            return False
        self.used += size
        return True

    def sums(self, width: int, device: torch.device) -> RunningMoments:
        """Empty sums."""
        return RunningMoments(width, device, self.dtype)


def statistics_of(moments: Moments) -> InputStatistics:
    """The statistics that a layer gets from these moments."""
    return InputStatistics(moments.products, moments.mean, moments.tokens)
