"""How many layers are computed at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch

STACK_BYTES = 1 << 30
"""Of float32 weights of one shape that are on an accelerator at a time."""
ALONE = 1 << 22
"""A weight of as many numbers or more has all cores of a CPU; a smaller one has one of them."""


def largest_together(sizes: Iterable[int]) -> int:
    """The most numbers a CPU works on at a time: of one large weight, or of one for each core."""
    ordered = sorted(sizes, reverse=True)
    small = [size for size in ordered if size < ALONE]
    return max(ordered[0], sum(small[: torch.get_num_threads()]))
