"""Checks for NaN and infinity in weights and factors. A check reads a tensor once."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity."""
    # One reading at the memory's speed; only a sum beyond the type's range needs the second look.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return math.isfinite(float(total)) or bool(torch.isfinite(values).all())


def refuse_non_finite(name: str, weight: Tensor) -> None:
    """Raises ValueError where the weight of the target `name` is not finite."""
    if not is_finite(weight):
        raise ValueError(
            f"target {name!r}: its weight holds NaN or infinite values; the checkpoint is "
            "damaged, or was read in a dtype that it overflows"
        )
