"""Reads from an accelerator that wait as rarely as possible."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_init.linalg.precision import wide


def on_host(numbers: Sequence[Tensor]) -> list[Any]:
    """Return each tensor as `Tensor.tolist` does, with one copy per device for all of them."""
    by_device: dict[torch.device, list[int]] = {}
    found: dict[int, Any] = {}
    for index, number in enumerate(numbers):
        if number.device.type == "cpu":
            found[index] = number.tolist()
        else:
            by_device.setdefault(number.device, []).append(index)
    for indices in by_device.values():
        some = [numbers[index].detach() for index in indices]
        # float64 holds every float32 number and all counts below 2^53.
        if len({number.dtype for number in some}) > 1:
            some = [wide(number) for number in some]
        values = torch.cat([number.flatten() for number in some]).cpu()
        parts = values.split([number.numel() for number in some])
        for index, part in zip(indices, parts, strict=True):
            given = numbers[index]
            found[index] = part.to(given.dtype).reshape(given.shape).tolist()
    return [found[index] for index in range(len(numbers))]


def named_on_host(**numbers: Tensor) -> dict[str, Any]:
    """Return the values of tensors by name, with one copy per device."""
    return dict(zip(numbers, on_host(list(numbers.values())), strict=True))


def wait_for_writes(devices: Iterable[torch.device]) -> None:
    """Wait until the writes that this thread has started on CUDA devices are complete.

    A new thread uses the default stream. Without this wait it could read memory that the caller's
    stream has not written yet.
    """
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
