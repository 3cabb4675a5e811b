"""The memory of one calibration pass: the size of an input's sums, and how many inputs fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_init.calibration.sums import Moments, RunningMoments
from lora_init.linalg.moments import InputStatistics, sums_bytes


@dataclass
class Budget:
    """Create the sums of distinct inputs within a memory limit.

    Attributes:
        memory: limit in bytes for all sums together; None is unlimited.
        dtype: dtype of the sums.
        used: bytes of the sums created so far.
    """

    memory: int | None = None
    dtype: torch.dtype = torch.float32
    used: int = 0

    def admits(self, width: int, count: int = 1) -> bool:
        """Whether more inputs of this width fit. If so, count their bytes."""
        size = count * sums_bytes(width, self.dtype)
        if self.memory is not None and self.used + size > self.memory:
            return False
        self.used += size
        return True

    def sums(self, width: int, device: torch.device) -> RunningMoments:
        """Create empty sums."""
        return RunningMoments(width, device, self.dtype)


def statistics_of(moments: Moments) -> InputStatistics:
    """Convert moments to a layer's `InputStatistics`."""
    return InputStatistics(moments.products, moments.mean, moments.tokens)
