"""Exponents: the slope of a straight line through logarithms, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress, t


@dataclass(frozen=True)
class PowerLaw:
    """y = factor · x^exponent.

    Attributes:
        low, high: the 95 % interval of the exponent, by Student's t on the residuals; equal to the
            exponent where there are no more than two points.
    """

    exponent: float
    low: float
    high: float
    factor: float

    def contains(self, exponent: float) -> bool:
        return self.low <= exponent <= self.high

    def __str__(self) -> str:
        return f"{self.exponent:.2f} [{self.low:.2f}, {self.high:.2f}]"


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares on log x and log y.

    Raises:
        ValueError: fewer than two points, or a value that is not positive.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{len(x)} and {len(y)} values; a line needs two points or more of each")
    if min(*x, *y) <= 0:
        raise ValueError("a power law is fitted to positive values")
    found = linregress(np.log(x), np.log(y))
    margin = 0.0
    if len(x) > 2:
        margin = float(t.ppf(0.975, len(x) - 2)) * float(found.stderr)
    slope = float(found.slope)
    return PowerLaw(slope, slope - margin, slope + margin, float(np.exp(found.intercept)))
