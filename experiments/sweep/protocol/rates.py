"""Learning rates: the grid of an arm, the choice in it, and the rate of an equal update size.

A grid is log-spaced around a middle c: rate(k) = c · 10^(k / per_decade), rounded to three
significant digits. A rate is thus the same number, and its run the same run, in every grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np


def rate(middle: float, step: int, per_decade: int) -> float:
    """The learning rate `step` places above the middle."""
    return float(f"{middle * 10 ** (step / per_decade):.3g}")


def first_steps(count: int) -> list[int]:
    """The places of a first grid; an even number leans to lower rates, which rarely diverge."""
    return list(range(-(count // 2), count - count // 2))


def next_step(tried: Iterable[int], best: int, extensions: int) -> int | None:
    """The place beyond the edge, if the best is at an edge and more places may be added.

    Args:
        tried: all places so far.
        best: the best of them.
        extensions: how many more may be added.
    """
    tried = sorted(tried)
    if extensions < 1 or best not in (tried[0], tried[-1]):
        return None
    # A single rate is both edges: try a higher one first.
    return best + 1 if best == tried[-1] else best - 1


@dataclass(frozen=True)
class Choice:
    """The best rate tried.

    Attributes:
        rate: the learning rate.
        merit: its mean over seeds; -inf if every rate diverged with some seed.
        at_edge: no lower, or no higher, rate was tried.
    """

    rate: float
    merit: float
    at_edge: bool


def choose(merits: Mapping[float, list[float]]) -> Choice:
    """The rate with the greatest mean over seeds, on validation figures alone.

    Of equal rates an inner one is chosen, then the lowest, so a plateau does not extend the grid. A
    rate that diverged with a single seed has mean -inf.

    Args:
        merits: one figure per seed, by rate; greater is better.
    """
    means = {rate: fmean(figures) for rate, figures in sorted(merits.items())}
    edges = (min(means), max(means))
    best = max(means, key=lambda rate: (means[rate], rate not in edges, -rate))
    return Choice(best, means[best], best in edges)


def rate_for(sizes: Mapping[float, float], target: float) -> float | None:
    """The rate, to three significant digits, at which the update has size `target`.

    log ‖ΔW‖ is interpolated linearly in the log of the rate.

    Args:
        sizes: update size (> 0) by learning rate; at least two rates.
        target: > 0.

    Returns:
        None if the tried rates do not enclose the target: beyond them the relation is unknown.
    """
    rates = sorted(rate for rate, size in sizes.items() if math.isfinite(size) and size > 0)
    logs = np.log([sizes[rate] for rate in rates]) - math.log(target)
    places = np.log(rates)
    for left in range(len(rates) - 1):
        below, above = logs[left], logs[left + 1]
        if below <= 0 <= above and above > below:
            share = -below / (above - below)
            found = math.exp(places[left] + share * (places[left + 1] - places[left]))
            return float(f"{found:.3g}")
    return None
