"""From losses over a grid of learning rates to two numbers: the best and the largest stable one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

LIMIT = 2.0
LAST = 0.2


@dataclass(frozen=True)
class Rate:
    """A learning rate read off a grid.

    Attributes:
        index: of the grid's rate below or at it.
        at_edge: the grid ends before it is decided.
    """

    value: float
    index: int
    at_edge: bool


def final_losses(losses: Float[Tensor, "steps rates"]) -> Float[np.ndarray, " rates"]:
    """The mean of the last fifth of the steps over the first loss; infinite where it diverged."""
    count = max(1, round(LAST * len(losses)))
    share = (losses[-count:].double().mean(0) / losses[0].double()).cpu().numpy()
    return np.nan_to_num(share, nan=np.inf, posinf=np.inf)


def peak_losses(losses: Float[Tensor, "steps rates"]) -> Float[np.ndarray, " rates"]:
    """The largest loss of all steps over the first one; infinite where it diverged."""
    share = (losses.double() / losses[0].double()).cpu().numpy()
    return np.nan_to_num(share, nan=np.inf, posinf=np.inf).max(axis=0)


def best_rate(rates: Float[np.ndarray, " rates"], final: Float[np.ndarray, " rates"]) -> Rate:
    """Where the loss is least: the vertex of the parabola, in logarithms, through the least loss of
    the grid and its two neighbours. A minimum of a noisy curve, but better than the grid's spacing.
    """
    place = int(np.argmin(final))
    if place in (0, len(rates) - 1):
        return Rate(float(rates[place]), place, True)
    left, middle, right = np.log(final[place - 1 : place + 2])
    step = math.log(rates[place] / rates[place - 1])
    bend = left - 2 * middle + right
    # Where a neighbour diverged its logarithm is infinite, and the grid's own rate stands.
    offset = 0.5 * (left - right) / bend if math.isfinite(bend) and bend > 0 else 0.0
    return Rate(float(rates[place] * math.exp(offset * step)), place, False)


def largest_stable_rate(
    rates: Float[np.ndarray, " rates"], peaks: Float[np.ndarray, " rates"], limit: float = LIMIT
) -> Rate:
    """Up to where the loss never exceeds `limit` times its first value, at this and every smaller
    rate; between two rates of the grid by the line through their logarithms.
    """
    above = np.flatnonzero(peaks > limit)
    if len(above) == 0:
        return Rate(float(rates[-1]), len(rates) - 1, True)
    place = int(above[0])
    if place == 0:
        return Rate(float(rates[0]), 0, True)
    low, high = np.log(peaks[place - 1]), np.log(peaks[place])
    part = (math.log(limit) - low) / (high - low) if math.isfinite(high) else 0.0
    step = math.log(rates[place] / rates[place - 1])
    return Rate(float(rates[place - 1] * math.exp(part * step)), place - 1, False)
