"""Means, ratios and exponents with their 95 % intervals, by Student's t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import linregress, t


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; a single value has an interval of length 0."""

    value: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        return self.low > 0.0

    @property
    def below_zero(self) -> bool:
        return self.high < 0.0

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high

    def show(self, form: str = "+.3f") -> str:
        """`+1.250 [+1.000, +1.500]`, or the estimate alone if there is no interval."""
        if self.low == self.high:
            return f"{self.value:{form}}"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def __str__(self) -> str:
        return self.show(".2f")


def mean(values: Sequence[float] | Float[np.ndarray, " values"]) -> Interval:
    """The mean of independent values, most often of differences between pairs.

    Raises:
        ValueError: there is no value.
    """
    series = np.asarray(values, dtype=np.float64)
    if not len(series):
        raise ValueError("values=[] is not supported: must hold at least one value.")
    middle, margin = float(series.mean()), 0.0
    if len(series) > 1:
        spread = float(series.std(ddof=1)) / len(series) ** 0.5
        margin = float(t.ppf(0.975, len(series) - 1)) * spread
    return Interval(middle, middle - margin, middle + margin)


def geometric_mean(values: Sequence[float] | Float[np.ndarray, " values"]) -> Interval:
    """The geometric mean of positive values, most often of ratios.

    Raises:
        ValueError: there is no value, or one is not positive.
    """
    series = np.asarray(values, dtype=np.float64)
    if not (series > 0).all():
        raise ValueError("a geometric mean of values <= 0 is not supported: must be positive.")
    logs = mean(np.log(series))
    return Interval(*(float(np.exp(x)) for x in (logs.value, logs.low, logs.high)))


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> Interval:
    """The exponent p of y = c · x^p, by least squares on log x and log y.

    Raises:
        ValueError: there are fewer than two points, or a value is not positive.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{len(x)} and {len(y)} values are not supported: must be two or more.")
    if min(*x, *y) <= 0:
        raise ValueError("a power law of values <= 0 is not supported: must be positive.")
    found = linregress(np.log(x), np.log(y))
    margin = 0.0
    if len(x) > 2:
        margin = float(t.ppf(0.975, len(x) - 2)) * float(found.stderr)
    slope = float(found.slope)
    return Interval(slope, slope - margin, slope + margin)
