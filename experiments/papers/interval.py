"""Means and ratios with their 95 % intervals, by Student's t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import t


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; of a single value the estimate alone, three times."""

    value: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        return self.low > 0.0

    @property
    def below_zero(self) -> bool:
        return self.high < 0.0

    def show(self, form: str = "+.3f") -> str:
        """`+1.250 [+1.000, +1.500]`; the estimate alone where there is no interval."""
        if self.low == self.high:
            return f"{self.value:{form}}"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def mean(values: Sequence[float] | Float[np.ndarray, " values"]) -> Interval:
    """Of the mean of independent values: differences between pairs, most often.

    Raises:
        ValueError: no value.
    """
    series = np.asarray(values, dtype=np.float64)
    if not len(series):
        raise ValueError("the mean of no values")
    middle, margin = float(series.mean()), 0.0
    if len(series) > 1:
        spread = float(series.std(ddof=1)) / len(series) ** 0.5
        margin = float(t.ppf(0.975, len(series) - 1)) * spread
    return Interval(middle, middle - margin, middle + margin)


def geometric_mean(values: Sequence[float] | Float[np.ndarray, " values"]) -> Interval:
    """Of the geometric mean of positive values: ratios, most often; by the mean of the logarithms.

    Raises:
        ValueError: no value, or one that is not positive.
    """
    series = np.asarray(values, dtype=np.float64)
    if not (series > 0).all():
        raise ValueError("a geometric mean is of positive values")
    logs = mean(np.log(series))
    return Interval(*(float(np.exp(x)) for x in (logs.value, logs.low, logs.high)))
