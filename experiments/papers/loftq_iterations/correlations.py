"""Which error of the layers orders the starts as the whole model's error does."""

from __future__ import annotations

import pandas as pd

GROUP = ["model", "bits", "rank"]


def rank_correlations(models: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlations with the model's error, within groups of equal bits and rank.

    Across groups everything grows with everything. A group's starts are few, related and measured
    without noise, so that they are no sample: there is no interval, but a figure a group.

    Args:
        models: columns `model`, `bits`, `rank`, `weight`, `output`, `error`.

    Returns:
        Index (model, bits, rank); columns `weight` and `output`; groups of three starts or more in
        which no error is the same for all.
    """
    found = {
        group: some[["weight", "output", "error"]].corr(method="spearman")["error"]
        for group, some in models.groupby(GROUP, sort=False)
        if len(some) > 2
    }
    frame = pd.DataFrame(
        [row[["weight", "output"]] for row in found.values()],
        index=pd.MultiIndex.from_tuples(list(found), names=GROUP) if found else None,
        columns=["weight", "output"],
    )
    return frame.dropna()
