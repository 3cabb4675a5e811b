"""Confidence intervals of scores, by bootstrap over held-out examples and seeds.

Let `c[i, k]` be 1 if run `i` answers example `k` correctly, for `N` examples and `S` seeds of an
arm. Its score is the mean over both. One draw takes `N` examples with replacement, giving counts
`w[k]`, and `S` seeds with replacement, `j[1..S]`:

    score* = 1/S  sum_s  1/N  sum_k  w[k] c[j[s], k]

The 95 % interval extends from the 2.5th to the 97.5th percentile of `score*`. All arms use the
same `w` and `j`. The paired difference of two arms is `score*_a - score*_b` within each draw, over
the seeds that both have. The effect of a hard example or a lucky seed on both cancels.

Limits of such an interval:

- Seeds: the variance among S resampled seeds is (S - 1)/S of its unbiased estimate. With one seed
  the interval covers the examples only. A claim about seeds needs three to five.
- It holds for this population of examples, this model and this learning rate.
- One of twenty comparisons of equal methods falls outside its interval by chance.
- For scores between 5 % and 95 % of 500 examples or more, its coverage is within one percentage
  point of 95 %. For few examples it is too narrow.

Without predictions (validation scores, a whole curve of settings) an interval is Student's t over
seeds: `m ± t(0.975, S - 1) s / sqrt(S)`, for three seeds or more. A bootstrap of three seeds never
reaches beyond the lowest and the highest, and covers the true mean in three cases of four.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
LEAST_SEEDS = 3


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its 95 % interval."""

    estimate: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def contains_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


class Bootstrap:
    """Two-way bootstrap of many runs over one set of examples.

    Args:
        correct: `(runs, examples)`, whether each run answered each example correctly.
        draws: number of resamples.
        seed: of the resampling itself; equal seeds give equal intervals.

    Examples:
        >>> correct = np.array([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=bool)
        >>> Bootstrap(correct).score([0, 1]).estimate
        0.625
    """

    def __init__(self, correct: np.ndarray, draws: int = 2000, seed: int = 0) -> None:
        if correct.ndim != 2 or correct.shape[1] == 0:
            raise ValueError(f"correct must be (runs, examples > 0), got shape {correct.shape}")
        generator = np.random.default_rng(seed)
        self.examples = correct.shape[1]
        self.means = correct.mean(axis=1, dtype=np.float64)
        self.resampled = _resample_examples(correct, draws, generator)  # (draws, runs)
        self.uniforms = generator.random((draws, len(correct)))

    def score(self, rows: list[int]) -> Interval:
        """Interval of the mean score of the runs `rows`, one per seed."""
        return _interval(self.means[rows].mean(), self._draws(rows))

    def difference(self, rows: list[int], baseline: list[int]) -> Interval:
        """Interval of the paired difference; `rows[i]` and `baseline[i]` share their seed."""
        if len(rows) != len(baseline):
            raise ValueError(f"{len(rows)} runs cannot be paired with {len(baseline)}")
        estimate = self.means[rows].mean() - self.means[baseline].mean()
        return _interval(estimate, self._draws(rows) - self._draws(baseline))

    def _draws(self, rows: list[int]) -> np.ndarray:
        picks = (self.uniforms[:, : len(rows)] * len(rows)).astype(int)  # (draws, seeds)
        scores = self.resampled[:, rows]
        return np.take_along_axis(scores, picks, axis=1).mean(axis=1)


def seed_interval(values: np.ndarray) -> Interval:
    """Student's t interval of the mean over seeds. Its ends are NaN for fewer than three seeds."""
    estimate, count = float(np.mean(values)), len(values)
    if count < LEAST_SEEDS:
        return Interval(estimate, np.nan, np.nan)
    margin = quantile(count) * float(np.std(values, ddof=1)) / count**0.5
    return Interval(estimate, estimate - margin, estimate + margin)


@cache
def quantile(count: int) -> float:
    """t(0.975) with `count - 1` degrees of freedom."""
    return float(student.ppf(0.5 + LEVEL / 2, count - 1))


def _resample_examples(
    correct: np.ndarray, draws: int, generator: np.random.Generator
) -> np.ndarray:
    """Score of every run in every draw: `counts @ correct.T / examples`, in blocks of draws."""
    runs, examples = correct.shape
    scores = np.empty((draws, runs))
    columns = correct.T.astype(np.float32)
    block = max(1, min(draws, 8_000_000 // examples))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        picks = generator.integers(0, examples, (size, examples))
        flat = picks + np.arange(size)[:, None] * examples
        counts = np.bincount(flat.ravel(), minlength=size * examples).reshape(size, examples)
        # Sums of small integers: exact in float32 below 2^24 examples.
        scores[start : start + size] = counts.astype(np.float32) @ columns
    return scores / examples


def _interval(estimate: float, draws: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))
