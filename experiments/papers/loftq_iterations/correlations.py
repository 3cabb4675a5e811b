"""Intervals of what is compared: paired means, and rank correlations within groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata, t

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def show(self, form: str = "+.3f") -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def paired_mean(differences: pd.Series) -> Interval:
    """Of differences between pairs, by Student's t; the estimate alone where there is one pair."""
    value, count = float(differences.mean()), len(differences)
    margin = 0.0
    if count > 1:
        margin = float(t.ppf(0.975, count - 1) * differences.std(ddof=1) / count**0.5)
    return Interval(value, value - margin, value + margin)


@dataclass(frozen=True)
class Correlations:
    """Spearman's rank correlations with the model's error, averaged over groups.

    Attributes:
        difference: output minus weight, over the same resamples.
    """

    weight: Interval
    output: Interval
    difference: Interval


def rank_correlations(models: pd.DataFrame, seed: int) -> Correlations:
    """Within groups of equal bits and rank: across them everything grows with everything.

    The intervals are percentiles over resamples of the starts of each group.

    Args:
        models: columns `bits`, `rank`, `weight`, `output`, `error`.
    """
    groups = [
        group[["weight", "output", "error"]].to_numpy()
        for _, group in models.groupby(["model", "bits", "rank"])
        if len(group) > 2
    ]
    if not groups:
        nothing = Interval(*[float("nan")] * 3)
        return Correlations(nothing, nothing, nothing)
    generator = np.random.default_rng(seed)
    found = []
    for group in groups:
        drawn = generator.integers(len(group), size=(RESAMPLES, len(group)))
        drawn[0] = np.arange(len(group))  # the starts themselves, then the resamples
        found.append(correlated(group[drawn]))
    means = np.ma.masked_invalid(found).mean(axis=0).filled(np.nan)
    means = np.column_stack([means, means[:, 1] - means[:, 0]])
    low, high = np.nanpercentile(means[1:], [2.5, 97.5], axis=0)
    return Correlations(
        *(Interval(*map(float, row)) for row in zip(means[0], low, high, strict=True))
    )


def correlated(
    samples: Float[np.ndarray, "samples starts 3"],
) -> Float[np.ndarray, "samples 2"]:
    """Of weight and of output with the error; NaN where one of them is the same for all starts."""
    ranks = rankdata(samples, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    squares = np.square(ranks).sum(axis=1)
    products = (ranks[:, :, :2] * ranks[:, :, 2:]).sum(axis=1)
    norms = np.sqrt(squares[:, :2] * squares[:, 2:])
    return np.divide(products, norms, out=np.full_like(products, np.nan), where=norms > 0)
