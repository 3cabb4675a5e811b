"""Forgetting at one amount learned, from points along trainings; and the rates that win.

Frames hold a row for each method, rate, seed and step: `fall`, of the loss on what is learned since
step 0; `divergence`, KL(original ‖ trained), and `perplexity` on what is to be kept; and arrays
over the blocks of it, `divergences` and `losses`, of which these two are the mean and the
exponential of the mean. At step 0 fall and divergences are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from jaxtyping import Float

LABELS = {
    "kaiming": "LoRA",
    "corda_kpm": "CorDA kpm",
    "corda_ipm": "CorDA ipm",
    "pissa": "PiSSA",
}
ARRAYS = ["divergences", "losses"]
SHARES = (0.5, 1.0)
"""Shares of what all have learned. The slowest start may reach all of it only at its highest rate;
every start passes half of it."""


def reading_at(
    falls: Sequence[float], values: Sequence[Float[np.ndarray, "*blocks"]], fall: float
) -> Float[np.ndarray, "*blocks"] | None:
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
    """Method, seed, rate, and what is forgotten there: each at the rate that diverges least at
    `fall`.

    Of each block's divergence the root is interpolated: near its start a model moves away in
    proportion to what it learns, and KL is the square of the distance. Losses are interpolated as
    they are, and with them the logarithm of the perplexity.
    """
    rows = []
    for (method, seed, rate), run in steps.groupby(["method", "seed", "rate"], sort=False):
        run = run.sort_values("step")
        falls = run["fall"].tolist()
        distances = reading_at(falls, [found**0.5 for found in run["divergences"]], fall)
        if distances is not None:
            losses = reading_at(falls, run["losses"].tolist(), fall)
            row = {"method": method, "seed": seed, "rate": rate}
            row |= {"divergences": distances**2, "losses": losses}
            rows.append(row | means(distances**2, losses))
    columns = ["method", "seed", "rate", "divergence", "perplexity", *ARRAYS]
    frame = pd.DataFrame(rows, columns=columns)
    best = frame.groupby(["method", "seed"], sort=False)["divergence"].idxmin()
    return frame.loc[best].reset_index(drop=True)


def means(
    divergences: Float[np.ndarray, " blocks"], losses: Float[np.ndarray, " blocks"]
) -> dict[str, float]:
    """What blocks of one length have in common; rounding makes a divergence slightly negative."""
    return {
        "divergence": max(float(divergences.mean()), 0.0),
        "perplexity": float(np.exp(losses.mean())),
    }


def at_the_end(steps: pd.DataFrame) -> pd.DataFrame:
    """Method, seed, rate, fall: each at the rate that has learned most after the last step."""
    last = steps[steps["step"] == steps["step"].max()]
    best = last.groupby(["method", "seed"], sort=False)["fall"].idxmax()
    return last.loc[best, ["method", "seed", "rate", "fall"]].reset_index(drop=True)


def at_shares(steps: pd.DataFrame) -> dict[float, pd.DataFrame]:
    """`at_equal_learning` by share of the common fall; nothing where some start learned nothing."""
    fall = reached_by_all(steps)
    return {share: at_equal_learning(steps, share * fall) for share in SHARES if fall > 0}


def winning_rates(steps: pd.DataFrame) -> dict[str, list[float]]:
    """The rates at which a method is best somewhere: at a share of the common fall, or at the end.

    A method that has none, as all its trainings diverged, is to be tried at all of its rates again.
    """
    won = pd.concat([at_the_end(steps), *at_shares(steps).values()])
    tried = {method: sorted(set(some["rate"])) for method, some in steps.groupby("method")}
    return tried | {method: sorted(set(some["rate"])) for method, some in won.groupby("method")}


def grid_edge(steps: pd.DataFrame, method: str, rates: Sequence[float]) -> str:
    """Whether one of the `rates` is the lowest or the highest that the method tried, so that a
    better one may lie beyond: the word, or nothing."""
    tried = steps.loc[steps["method"] == method, "rate"]
    return "lowest" if min(rates) == tried.min() else "highest" if max(rates) == tried.max() else ""
