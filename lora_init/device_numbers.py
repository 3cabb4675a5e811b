"""Numbers that were computed on devices, read together: each read waits for a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Num
from torch import Tensor


def on_host(numbers: Sequence[Num[Tensor, ""]]) -> list[float | int]:
    """The values of tensors with one number each, with one copy from each device."""
    places: dict[torch.device, list[int]] = {}
    for index, number in enumerate(numbers):
        places.setdefault(number.device, []).append(index)
    found: dict[int, float | int] = {}
    for indices in places.values():
        values = torch.stack([numbers[index] for index in indices]).cpu().tolist()
        found |= dict(zip(indices, values, strict=True))
    return [found[index] for index in range(len(numbers))]
