"""Numbers in their own precision, whatever autocast the caller has on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

DEVICES = ("cpu", "cuda")


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in the dtype of their factors: autocast would round them to 16 bits.

    Factors, statistics and edits of a base must not depend on whether a training script happens to
    have autocast on where it adapts, merges or restores the model.
    """
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
