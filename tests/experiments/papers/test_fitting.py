"""Exponents and their intervals, against numpy's normal equations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from experiments.papers.fitting import fit_power_law


def test_an_exact_law_is_found():
    fit = fit_power_law([1, 2, 4, 8], [3 * x**-0.5 for x in (1, 2, 4, 8)])
    assert fit.exponent == pytest.approx(-0.5)
    assert fit.factor == pytest.approx(3)
    assert fit.contains(fit.exponent)


def test_the_interval_is_that_of_least_squares():
    x = np.array([1.0, 2, 3, 5, 8])
    y = np.array([1.1, 1.9, 3.2, 4.6, 8.8])
    design = np.stack([np.log(x), np.ones(5)], axis=1)
    solved, residual, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    variance = residual[0] / 3 * np.linalg.inv(design.T @ design)[0, 0]
    margin = t.ppf(0.975, 3) * variance**0.5
    fit = fit_power_law(x, y)
    assert (fit.low, fit.high) == pytest.approx((solved[0] - margin, solved[0] + margin))


@pytest.mark.parametrize(("x", "y"), [([1], [1]), ([1, 2], [1]), ([1, 2], [0, 1])])
def test_what_has_no_line_is_refused(x, y):
    with pytest.raises(ValueError, match=r"line|power law"):
        fit_power_law(x, y)
