"""Paired differences between arms, with the residual variance pooled over all of them.

The value of arm `a` with seed `s` is modeled as `y = mean_a + shift_s + rest`. The shift of a seed
is common to all arms, so it cancels in a difference of two arms. The rest has one variance for all
arms. With `A` arms and `S` seeds it is estimated with `(A - 1)(S - 1)` degrees of freedom, so that
two seeds already give an interval. Missing runs make the fit a least-squares one; nothing else
changes.

For a score that is a mean over examples, the choice of examples varies too. With `d[s, k]` the
difference of two arms on seed `s` and example `k`,

    var(mean d) = v_seeds / S + v_examples / N + v_rest / (S N)

The two-way layout gives the first and the last term. The variance over examples of the mean over
seeds gives the second and the last. So the last is subtracted once (Owen 2007, The pigeonhole
bootstrap, section 3). Its degrees of freedom are Satterthwaite's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import stdtr, stdtrit

from .statistics import LEVEL

EXACT = 1e-12  # residuals below this share of the largest value are rounding


@dataclass(frozen=True)
class Estimate:
    """A difference with its standard error; both NaN if the runs do not determine it."""

    value: float
    error: float
    freedom: float

    @property
    def half_width(self) -> float:
        if self.error == 0:
            return 0.0
        return float(stdtrit(self.freedom, 0.5 + LEVEL / 2)) * self.error

    @property
    def p(self) -> float:
        """Two-sided p-value of no difference."""
        if self.error == 0:
            return float(self.value == 0)
        return float(2 * stdtr(self.freedom, -abs(self.value / self.error)))


class Layout:
    """The least-squares fit of arms and seeds to one quantity.

    Args:
        arms, seeds, values: of each run. Runs whose value is NaN must be left out.

    Attributes:
        variance: of the rest; NaN without degrees of freedom.
        freedom: degrees of freedom of the rest.
        shared: variance of the seeds' common shifts, at least 0; NaN without degrees of freedom.
    """

    def __init__(self, arms: Sequence[str], seeds: Sequence[int], values: np.ndarray) -> None:
        names = {arm: place for place, arm in enumerate(dict.fromkeys(arms))}
        shifts = {seed: place for place, seed in enumerate(dict.fromkeys(seeds))}
        self.places = names
        self.design, self.inverse, rank = design(
            tuple(names[arm] for arm in arms), tuple(shifts[seed] for seed in seeds)
        )
        own = self.design[:, : len(names)]
        self.solution = self.inverse @ (self.design.T @ values)
        rest = float(((values - self.design @ self.solution) ** 2).sum())
        if rest <= len(values) * (EXACT * np.abs(values).max(initial=0.0)) ** 2:
            rest = 0.0
        self.freedom = len(values) - rank
        self.variance = rest / self.freedom if self.freedom > 0 else np.nan
        without_seeds = float(((values - own @ (own.T @ values / own.sum(0))) ** 2).sum())
        lost = rank - len(names)
        between = (without_seeds - rest) / lost if lost > 0 else np.nan
        self.shared = max((between - self.variance) / len(names), 0.0)

    def difference(self, arm: str, baseline: str) -> Estimate:
        """`arm` minus `baseline`; NaN if no chain of common seeds joins them."""
        nothing = Estimate(np.nan, np.nan, np.nan)
        if arm not in self.places or baseline not in self.places:
            return nothing
        contrast = np.zeros(self.design.shape[1])
        contrast[self.places[arm]] += 1.0
        contrast[self.places[baseline]] -= 1.0
        projected = self.inverse @ (self.design.T @ (self.design @ contrast))
        if np.abs(projected - contrast).max() > 1e-8:
            return nothing
        value = float(contrast @ self.solution)
        error = np.sqrt(self.variance * (contrast @ self.inverse @ contrast))
        largest = np.abs(self.solution).max()
        return Estimate(0.0 if abs(value) <= EXACT * largest else value, float(error), self.freedom)


@lru_cache(maxsize=64)
def design(arms: tuple[int, ...], seeds: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int]:
    """The design matrix of runs with these arms and seeds, its inverse Gram matrix, and its rank.

    The columns of the arms and those of the seeds both add up to one, so the inverse is a
    pseudoinverse.
    """
    own = np.eye(max(arms) + 1)[list(arms)]
    matrix = np.hstack([own, np.eye(max(seeds) + 1)[list(seeds)]])
    gram = matrix.T @ matrix
    inverse = np.linalg.pinv(gram, hermitian=True)
    return matrix, inverse, round(float(np.trace(inverse @ gram)))


def example_parts(difference: np.ndarray) -> tuple[float, float]:
    """Variance over examples of the mean over seeds, and of the rest, for one seed and example.

    Args:
        difference: (seeds, examples), the difference of two arms.

    Returns:
        `v_examples + v_rest / S` and `v_rest`. The second is 0 for a single seed.
    """
    seeds, examples = difference.shape
    if examples < 2:
        return np.nan, np.nan
    mean = difference.mean(axis=0)
    over_examples = float(mean.var(ddof=1))
    if seeds < 2:
        return over_examples, 0.0
    rest = difference - mean - difference.mean(axis=1, keepdims=True) + difference.mean()
    return over_examples, float((rest**2).sum() / ((seeds - 1) * (examples - 1)))


def with_examples(pooled: Estimate, difference: np.ndarray) -> Estimate:
    """An estimate over seeds, widened by the choice of the examples.

    Args:
        pooled: the difference over seeds alone.
        difference: (seeds, examples), the same difference on each example.
    """
    seeds, examples = difference.shape
    over_examples, rest = example_parts(difference)
    by_seed, by_example = pooled.error**2, over_examples / examples
    # The variance over seeds has the part of a single seed and example already.
    total = max(by_seed + by_example - rest / (seeds * examples), by_seed, by_example)
    if not total > 0:
        return Estimate(pooled.value, float(np.sqrt(total)), pooled.freedom)
    spread = by_seed**2 / pooled.freedom + by_example**2 / (examples - 1)
    return Estimate(pooled.value, float(np.sqrt(total)), float(total**2 / spread))


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979): `max over j <= i of min(1, (m - j) p_(j))`.

    SciPy has the false discovery rate only.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    stepped = np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(stepped) if len(p) else stepped
    return adjusted.tolist()
