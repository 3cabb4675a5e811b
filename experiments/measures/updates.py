"""How far training has moved the adapted weights, relative to their norm."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lora_init import LoraModel

from .products import update_norm

COMMON_STEP = 100
"""The step at which the protocol compares the update sizes of runs of all lengths."""


def is_due(step: int, steps: int, every: int) -> bool:
    """Whether the update is measured after `step` of `steps`."""
    return step in (COMMON_STEP, steps) or (every > 0 and step % every == 0)


def update_size(model: LoraModel, norms: Mapping[str, float]) -> float | None:
    """‖s (B A - B0 A0)‖ / ‖W‖ over all adapted layers together, W the original weights."""
    updates = [update_norm(layer) for layer in model.layers.values()]
    return ratio(math.hypot(*updates), math.hypot(*(norms[name] for name in model.layers)))


def ratio(part: float, whole: float) -> float | None:
    """part / whole; None if the whole is zero."""
    return part / whole if whole > 0 else None
