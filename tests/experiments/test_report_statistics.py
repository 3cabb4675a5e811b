"""Intervals compared with cases whose answer is known."""

import numpy as np
import pytest

from experiments.report.statistics import Bootstrap, seed_interval


def binomial(generator, probability, runs, examples):
    return generator.random((runs, examples)) < probability


def test_width_is_the_binomial_one():
    """One run of n examples: the standard error is sqrt(p (1 - p) / n)."""
    correct = binomial(np.random.default_rng(1), 0.7, 1, 2000)
    share = correct.mean()
    interval = Bootstrap(correct, draws=4000).score([0])
    expected = 2 * 1.96 * np.sqrt(share * (1 - share) / 2000)
    assert interval.estimate == pytest.approx(share)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.06)


def test_coverage_is_nominal():
    """The true score lies inside in 95 % of repetitions (here 400: standard error 1.1 %)."""
    generator = np.random.default_rng(2)
    inside = 0
    for repetition in range(400):
        correct = binomial(generator, 0.7, 1, 500)
        interval = Bootstrap(correct, draws=500, seed=repetition).score([0])
        inside += interval.low <= 0.7 <= interval.high
    assert 0.915 <= inside / 400 <= 0.98


def test_equal_methods_are_ties_at_the_nominal_rate():
    generator = np.random.default_rng(3)
    ties = 0
    for repetition in range(300):
        hard = generator.random(600) < 0.5
        correct = np.stack([generator.random(600) < np.where(hard, 0.5, 0.95) for _ in range(2)])
        ties += Bootstrap(correct, draws=400, seed=repetition).difference([0], [1]).contains_zero
    assert 0.91 <= ties / 300 <= 0.985


def test_two_way_variance_is_the_sum_of_both_parts():
    """Over constant runs only the seeds vary: the seeds' variance, with its (S - 1)/S."""
    shares = np.array([0.6, 0.7, 0.8])
    correct = np.zeros((3, 4000), dtype=bool)
    for row, share in zip(correct, shares, strict=True):
        row[: int(share * 4000)] = True
    bootstrap = Bootstrap(correct, draws=6000)
    seeds = shares.var() / 3  # shares.var() is already (S - 1)/S of the unbiased one
    examples = np.mean(shares.mean() * (1 - shares.mean())) / 4000
    assert bootstrap._draws([0, 1, 2]).var() == pytest.approx(seeds + examples, rel=0.1)


def test_pairing_removes_what_is_common():
    """Pairing distinguishes two runs that differ in 20 of 2,000 examples."""
    generator = np.random.default_rng(4)
    baseline = generator.random(2000) < 0.75
    better = baseline.copy()
    better[np.flatnonzero(~baseline)[:20]] = True
    bootstrap = Bootstrap(np.stack([baseline, better]))
    assert not bootstrap.difference([1], [0]).contains_zero
    assert bootstrap.score([1]).low < bootstrap.score([0]).high
    same = bootstrap.difference([0], [0])
    assert (same.estimate, same.low, same.high) == (0, 0, 0)


def test_the_seed_determines_the_interval():
    correct = binomial(np.random.default_rng(5), 0.6, 4, 300)
    assert Bootstrap(correct).score([0, 2]) == Bootstrap(correct).score([0, 2])
    assert Bootstrap(correct).score([0, 2]) != Bootstrap(correct, seed=1).score([0, 2])


@pytest.mark.parametrize("shape", [(3,), (3, 0)])
def test_a_wrong_shape_is_refused_by_value(shape):
    with pytest.raises(ValueError, match="got shape"):
        Bootstrap(np.zeros(shape, dtype=bool))


def test_the_interval_over_seeds_is_students():
    """It equals the textbook's t(0.975, 4) = 2.776, and covers the mean in 95 % of cases."""
    values = np.array([0.70, 0.72, 0.71, 0.75, 0.73])
    interval = seed_interval(values)
    margin = 2.776 * np.sqrt(((values - values.mean()) ** 2).sum() / 4 / 5)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - margin, rel=1e-3)
    assert interval.high == pytest.approx(values.mean() + margin, rel=1e-3)
    assert np.isnan(seed_interval(values[:2]).low)
    generator = np.random.default_rng(8)
    found = [seed_interval(generator.normal(0.7, 0.02, 3)) for _ in range(2000)]
    assert 0.935 <= np.mean([i.low <= 0.7 <= i.high for i in found]) <= 0.965
