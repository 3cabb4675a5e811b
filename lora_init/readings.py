"""Numbers on a device, read together.

Reading a number waits until the device has finished all work before it. Many numbers are therefore
copied at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

Number = bool | int | float


def read(numbers: Sequence[Tensor]) -> list[Number]:
    """The values of one-element tensors, as `Tensor.item` gives them, by one copy a device."""
    by_device = defaultdict(list)
    for index, number in enumerate(numbers):
        by_device[number.device].append(index)
    values: list[Number] = [0.0] * len(numbers)
    for indices in by_device.values():
        # float64 holds every float32 number and all counts below 2^53.
        some = [numbers[index].detach().reshape(()).double() for index in indices]
        for index, value in zip(indices, torch.stack(some).tolist(), strict=True):
            values[index] = _as(numbers[index].dtype, value)
    return values


def _as(dtype: torch.dtype, value: float) -> Number:
    if dtype == torch.bool:
        return bool(value)
    return value if dtype.is_floating_point else int(value)
