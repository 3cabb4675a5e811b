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


def read(numbers: Sequence[Tensor]) -> list[Number | list[Number]]:
    """The values of numbers and vectors, as `Tensor.tolist` gives them, by one copy a device."""
    by_device = defaultdict(list)
    for index, number in enumerate(numbers):
        by_device[number.device].append(index)
    values: list[Number | list[Number]] = [0.0] * len(numbers)
    for indices in by_device.values():
        # float64 holds every float32 number and all counts below 2^53.
        some = [numbers[index].detach().flatten().double() for index in indices]
        together = torch.cat(some).cpu().split([len(part) for part in some])
        for index, part in zip(indices, together, strict=True):
            given = numbers[index]
            values[index] = part.to(given.dtype).reshape(given.shape).tolist()
    return values


def read_named(**numbers: Tensor) -> dict[str, Number | list[Number]]:
    """The same by name."""
    return dict(zip(numbers, read(list(numbers.values())), strict=True))
