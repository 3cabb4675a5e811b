"""Contenders are timed in alternation, and compared within each round.

`torch.utils.benchmark.Timer` runs its statement at least twice on the same objects before it
measures. A model can only be injected into once, so the rounds here prepare fresh objects instead.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

LEAST_PAIRS = 5


@dataclass(frozen=True)
class Contender:
    """What is timed: `run(prepare())`, of which only `run` counts."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


@dataclass(frozen=True)
class Turn:
    """One timed call and its result."""

    round: int
    name: str
    seconds: float
    result: Any


@dataclass(frozen=True)
class Ratio:
    """A median of ratios with its 95 % interval; the interval is None for few pairs."""

    estimate: float
    interval: tuple[float, float] | None = None


def alternate(
    contenders: Mapping[str, Contender],
    rounds: int,
    seconds: float,
    device: torch.device,
    least: int = 1,
) -> Iterator[Turn]:
    """Time each contender once per round; every other round in reverse order.

    Args:
        rounds: the most rounds.
        seconds: no round starts after so many, except the first `least` rounds.
    """
    start = time.perf_counter()
    names = list(contenders)
    for number in range(rounds):
        if number >= least and time.perf_counter() - start > seconds:
            return
        for name in names if number % 2 == 0 else reversed(names):
            yield timed(contenders[name], number, name, device)


def timed(contender: Contender, number: int, name: str, device: torch.device) -> Turn:
    """Run one contender once, without garbage collection inside the measured time."""
    prepared = contender.prepare()
    gc.collect()
    gc.disable()
    try:
        synchronize(device)
        start = time.perf_counter()
        result = contender.run(prepared)
        synchronize(device)
        return Turn(number, name, time.perf_counter() - start, result)
    finally:
        gc.enable()


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Return the median of above[i] / below[i] with its bootstrap interval.

    Pairs come from the same round. A burst of other work hits both members of most pairs.

    Raises:
        ValueError: no pair, or lengths that differ.
    """
    if not above or len(above) != len(below):
        raise ValueError(f"pairs={len(above)} and {len(below)} is not supported: must be equal")
    ratios = np.asarray(above, dtype=float) / np.asarray(below, dtype=float)
    estimate = float(np.median(ratios))
    if len(ratios) < LEAST_PAIRS:
        return Ratio(estimate)
    found = bootstrap((ratios,), np.median, method="percentile", rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return Ratio(estimate, (float(low), float(high)))


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
