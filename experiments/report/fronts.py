"""Learning against forgetting: what each method can have of one for the other."""

from __future__ import annotations

import numpy as np
import pandas as pd

COLUMNS = (
    "task", "arm", "method", "rank", "learning_rate", "learned", "forgetting", "seeds", "on_front",
    "leads",
)  # fmt: skip


def fronts(points: pd.DataFrame) -> pd.DataFrame:
    """The mean over seeds of each arm at each of its learning rates.

    `on_front`: no other rate of the arm learns more and forgets less. `leads`: no point of any arm
    of the task at this rank does. Rates with fewer finished seeds than the arm's others are left
    out, because their mean covers other seeds.

    Args:
        points: runs with `curve`, the score, and `forgetting`.
    """
    known = points[points["curve"].notna() & points["forgetting"].notna()]
    if known.empty:
        return pd.DataFrame(columns=list(COLUMNS))
    keys = ["task", "arm", "method", "rank", "learning_rate"]
    means = known.groupby(keys, sort=False, dropna=False).agg(
        learned=("curve", "mean"), forgetting=("forgetting", "mean"), seeds=("seed", "nunique")
    )
    means = means.reset_index()
    most = means.groupby(["task", "arm"])["seeds"].transform("max")
    means = means[means["seeds"] == most].reset_index(drop=True)
    for name, groups in (("on_front", ["task", "arm"]), ("leads", ["task", "rank"])):
        best = pd.Series(False, index=means.index)
        for _, group in means.groupby(groups, sort=False):
            best[group.index] = not_dominated(group["learned"], group["forgetting"])
        means[name] = best
    return means[list(COLUMNS)]


def not_dominated(gain: pd.Series, loss: pd.Series) -> np.ndarray:
    """Whether no other point gains more and loses no more, or loses less and gains no less."""
    gains, losses = gain.to_numpy(), loss.to_numpy()
    as_good = (gains[None] >= gains[:, None]) & (losses[None] <= losses[:, None])
    better = (gains[None] > gains[:, None]) | (losses[None] < losses[:, None])
    return ~(as_good & better).any(axis=1)
