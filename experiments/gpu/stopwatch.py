"""Seconds of a call on a device, with the device's queue empty before and after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from experiments.benchmark.timing import synchronize


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


def best_of(function: Callable[[], Any], device: torch.device, calls: int = 3) -> float:
    """The least seconds of some calls after a first one, which loads kernels."""
    function()
    return min(timed(function, device)[0] for _ in range(calls))


def rounds(
    contenders: dict[str, Callable[[], Any]], device: torch.device, count: int
) -> dict[str, float]:
    """The median seconds of each contender. They take turns, so that a clock change hits all."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(count):
        for name in names if number % 2 == 0 else reversed(names):
            taken[name].append(timed(contenders[name], device)[0])
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
