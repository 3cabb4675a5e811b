"""Numbers that were computed on devices, read together: each read waits for a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Value = bool | int | float | list


def on_host(numbers: Sequence[Tensor]) -> list[Value]:
    """The values of numbers and vectors, as `Tensor.tolist` gives them, by one copy a device."""
    places: dict[torch.device, list[int]] = {}
    for index, number in enumerate(numbers):
        places.setdefault(number.device, []).append(index)
    found: dict[int, Value] = {}
    for indices in places.values():
        some = [numbers[index].detach() for index in indices]
        # float64 holds every float32 number and all counts below 2^53.
        if len({number.dtype for number in some}) > 1:
            some = [number.double() for number in some]
        values = torch.cat([number.flatten() for number in some]).cpu()
        parts = values.split([number.numel() for number in some])
        for index, part in zip(indices, parts, strict=True):
            given = numbers[index]
            found[index] = part.to(given.dtype).reshape(given.shape).tolist()
    return [found[index] for index in range(len(numbers))]


def named_on_host(**numbers: Tensor) -> dict[str, Value]:
    """The same by name."""
    return dict(zip(numbers, on_host(list(numbers.values())), strict=True))


def wait_for_writes(devices: Iterable[torch.device]) -> None:
    """Wait for what this thread has started on these devices; on a CPU nothing is left to do."""
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
