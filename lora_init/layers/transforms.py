"""Whether a forward pass may use autograd functions of our own."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether torch.func, forward-mode differentiation or torch.jit.trace looks on.

    They see through plain operations only: an autograd function with in-place products would be
    refused by the first two and could not be saved by the third.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )
