"""Random draws and constants on the CPU, in float32 by default.

torch's defaults for dtype and device are the caller's: results must not depend on them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu")


def uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """Float32 numbers, uniform in [0, 1)."""
    return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu")


def zeros(*shape: int) -> Tensor:
    """Float32 zeros."""
    return torch.zeros(*shape, dtype=torch.float32, device="cpu")
