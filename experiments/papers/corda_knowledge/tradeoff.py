"""Forgetting at one amount learnt, from points along trainings.

Frames hold a row for each method, rate, seed and step: `fall`, of the loss on what is learnt since
step 0; `divergence`, KL(original ‖ trained), and `perplexity` on what is to be kept. At step 0 the
first two are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd


def reading_at(falls: Sequence[float], values: Sequence[float], fall: float) -> float | None:
    """Where one training first reaches `fall` (> 0), by a straight line between measured steps;
    None where it never does.

    Args:
        falls, values: at measured steps in their order, the start first, whose fall is 0.
    """
    for (before, near), (after, far) in pairwise(zip(falls, values, strict=True)):
        if before < fall <= after:
            return near + (fall - before) / (after - before) * (far - near)
    return None


def reached_by_all(steps: pd.DataFrame) -> float:
    """The largest fall that every method reaches with every seed, at one of its rates."""
    return float(steps.groupby(["method", "seed"])["fall"].max().min())


def at_equal_learning(steps: pd.DataFrame, fall: float) -> pd.DataFrame:
    """Method, seed, rate, divergence, perplexity: each at the rate that diverges least at `fall`.

    Of the divergence its root is interpolated: near its start a model moves away in proportion to
    what it learns, and KL is the square of the distance. Of the perplexity it is the logarithm.
    """
    rows = []
    for (method, seed, rate), run in steps.groupby(["method", "seed", "rate"], sort=False):
        run = run.sort_values("step")
        falls = run["fall"].tolist()
        distance = reading_at(falls, (run["divergence"] ** 0.5).tolist(), fall)
        if distance is not None:
            loss = reading_at(falls, np.log(run["perplexity"]).tolist(), fall)
            found = {"divergence": distance**2, "perplexity": math.exp(loss)}
            rows.append({"method": method, "seed": seed, "rate": rate, **found})
    columns = ["method", "seed", "rate", "divergence", "perplexity"]
    frame = pd.DataFrame(rows, columns=columns)
    best = frame.groupby(["method", "seed"], sort=False)["divergence"].idxmin()
    return frame.loc[best].reset_index(drop=True)
