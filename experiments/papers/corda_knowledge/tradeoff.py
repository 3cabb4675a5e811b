"""Forgetting at one amount learnt, from points along trainings.

Frames hold a row for each method, rate, seed and step: `fall`, of the loss on what is learnt since
step 0, and `divergence`, KL(original ‖ trained) on what is to be kept; both are 0 at step 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pandas as pd


def divergence_at(
    falls: Sequence[float], divergences: Sequence[float], fall: float
) -> float | None:
    """Where one training first reaches `fall` (> 0); None where it never does.

    Between two points the square root is interpolated: near its start a model moves away in
    proportion to what it learns, and KL is the square of the distance.

    Args:
        falls, divergences: at measured steps in their order, the start (0, 0) first.
    """
    points = list(zip(falls, divergences, strict=True))
    for (before, near), (after, far) in pairwise(points):
        if before < fall <= after:
            share = (fall - before) / (after - before)
            return (near**0.5 + share * (far**0.5 - near**0.5)) ** 2
    return None


def reached_by_all(steps: pd.DataFrame) -> float:
    """The largest fall that every method reaches with every seed, at one of its rates."""
    return float(steps.groupby(["method", "seed"])["fall"].max().min())


def at_equal_learning(steps: pd.DataFrame, fall: float) -> pd.DataFrame:
    """Method, seed, rate, divergence: each at the rate that forgets least at `fall`."""
    rows = []
    for (method, seed, rate), run in steps.groupby(["method", "seed", "rate"], sort=False):
        run = run.sort_values("step")
        found = divergence_at(run["fall"].tolist(), run["divergence"].tolist(), fall)
        if found is not None:
            rows.append({"method": method, "seed": seed, "rate": rate, "divergence": found})
    frame = pd.DataFrame(rows, columns=["method", "seed", "rate", "divergence"])
    best = frame.groupby(["method", "seed"])["divergence"].idxmin()
    return frame.loc[best].reset_index(drop=True)
