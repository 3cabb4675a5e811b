"""The learning rate at which an arm moves its weights as far as the baseline does.

A method whose factors start large moves further at the same rate; at equal rates one then compares
step lengths. Here log ‖ΔW‖ is taken as piecewise linear in the log of the rate between the rates
that were tried, and solved for the baseline's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def rate_for(sizes: Mapping[float, float], target: float) -> float | None:
    """The rate, to three significant digits, at which the update has size `target`.

    Args:
        sizes: update size (> 0) by learning rate; two rates at least.
        target: > 0.

    Returns:
        None where the tried rates do not reach the target from both sides: beyond them the
        relation is unknown.
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
