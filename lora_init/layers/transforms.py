"""Check whether a forward pass may use custom autograd functions."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether torch.func, forward-mode differentiation or torch.jit.trace is active.

    They support plain operations only. The first two reject autograd functions with in-place
    products; the third cannot save them.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    )
