"""Tests of intervals of means, ratios and exponents, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import linregress, t, ttest_1samp

from experiments.papers import interval


def test_a_mean_has_students_interval():
    values = [1.0, 2.5, 3.0, 4.25, 0.5]
    found = interval.mean(values)
    known = ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((known.low, known.high))
    assert found.above_zero is (found.low > 0)


def test_a_geometric_mean_is_a_mean_of_logarithms():
    values = [0.5, 0.25, 0.125]
    found, logs = interval.geometric_mean(values), interval.mean(np.log(values))
    assert found.value == pytest.approx(0.25)
    assert (found.low, found.high) == pytest.approx((np.exp(logs.low), np.exp(logs.high)))


def test_one_value_has_no_interval():
    assert interval.mean([2.0]) == interval.Interval(2.0, 2.0, 2.0)
    assert interval.mean([2.0]).show(".1f") == "2.0"
    assert interval.mean([1.0, 3.0]).show(".1f") == "2.0 [-10.7, 14.7]"


def test_values_without_a_mean_are_refused():
    with pytest.raises(ValueError, match="at least one value"):
        interval.mean([])
    with pytest.raises(ValueError, match="positive"):
        interval.geometric_mean([1.0, 0.0])


def test_an_exponent_is_fitted_to_logarithms():
    x = [4.0, 8.0, 16.0, 32.0]
    exact = interval.fit_exponent(x, [3 * value**-0.5 for value in x])
    assert exact.value == pytest.approx(-0.5)
    noisy = interval.fit_exponent(x, [1.0, 0.8, 0.5, 0.4])
    found = linregress(np.log(x), np.log([1.0, 0.8, 0.5, 0.4]))
    assert noisy.value == pytest.approx(found.slope)
    assert noisy.high - noisy.value == pytest.approx(t.ppf(0.975, 2) * found.stderr)
    assert noisy.contains(noisy.value)
    two = interval.fit_exponent(x[:2], [1.0, 2.0])
    assert two.low == two.high == pytest.approx(1.0)
    for bad in ([1.0], [1.0, 0.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="not supported"):
            interval.fit_exponent(x[: len(bad)], bad)
