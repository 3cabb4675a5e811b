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
    generator = np.random.default_rng(seed)
    found = [correlated(groups)]
    for _ in range(RESAMPLES):
        drawn = [group[generator.integers(len(group), size=len(group))] for group in groups]
        found.append(correlated(drawn))
    table = np.array(found)
    table = np.column_stack([table, table[:, 1] - table[:, 0]])
    low, high = np.nanpercentile(table[1:], [2.5, 97.5], axis=0)
    return Correlations(
        *(Interval(*map(float, row)) for row in zip(table[0], low, high, strict=True))
    )


def correlated(groups: list[Float[np.ndarray, "starts 3"]]) -> tuple[float, float]:
    """(weight, output), means over the groups. Few starts drawn again and again say nothing."""
    pairs = []
    for group in groups:
        ranks = rankdata(group, axis=0)
        if all(len(np.unique(column)) > 2 for column in ranks.T):
            pairs.append(np.corrcoef(ranks.T)[2, :2])
    weight, output = np.mean(pairs, axis=0) if pairs else (np.nan, np.nan)
    return float(weight), float(output)
