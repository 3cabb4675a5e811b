"""The choice of a learning rate, on validation figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Choice:
    """The best rate tried.

    Attributes:
        rate: the learning rate.
        merit: its mean over seeds; -inf where every rate diverged with some seed.
        at_edge: no lower, or no higher, rate was tried.
    """

    rate: float
    merit: float
    at_edge: bool


def choose(merits: Mapping[float, list[float]]) -> Choice:
    """The rate with the greatest mean over seeds; of equal ones an inner one, then the lowest.

    An edge is chosen only where it is better than all others: a plateau is no reason to go on. A
    rate at which a single seed diverged has mean -inf: a setting that fails one time in three is
    nobody's choice.

    Args:
        merits: by rate, one figure a seed, greater is better.
    """
    means = {rate: fmean(figures) for rate, figures in sorted(merits.items())}
    edges = (min(means), max(means))
    best = max(means, key=lambda rate: (means[rate], rate not in edges, -rate))
    return Choice(best, means[best], best in edges)
