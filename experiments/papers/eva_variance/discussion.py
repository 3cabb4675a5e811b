"""What the rows of EVA's claims say in a few sentences, with their figures."""

from __future__ import annotations

import pandas as pd

from ..starts import UNCENTRED
from .inputs import ANOTHER_ORDER

EXACT = 0.99


def discussed(gradients: pd.DataFrame, ranks: pd.DataFrame, convergence: pd.DataFrame) -> list[str]:
    return [
        assumption(gradients),
        orders(convergence),
        "E‖∇B‖² as it comes says as much about ‖A‖ as about directions: gaussian’s A has the norm "
        "√(n / r), and under Adam, whose steps no gradient’s size changes, directions alone are "
        "left.",
        moved_ranks(ranks),
    ]


def assumption(gradients: pd.DataFrame) -> str:
    """Whether the input's directions are those of the gradient, which is what the proof assumes."""
    some = gradients[gradients["method"].isin(["eva", "eva_uncentred"])]
    found = some.groupby("method")["span"].median() / some.groupby("method")["ceiling"].median()
    told = " and ".join(f"{name} holds {value:.0%}" for name, value in found.items())
    first = f"Of the energy that the best A of this rank would hold of a fresh gradient, {told} in "
    if found[UNCENTRED] >= EXACT:
        return first + "the median."
    return first + (
        "the median. The theorem assumes gradients that are independent of the inputs; what is "
        "missing shows how far they are not, and what a few batches leave to chance."
    )


def orders(convergence: pd.DataFrame) -> str:
    """How much the order of the batches matters: its range over the orders drawn."""
    mixed = convergence[convergence["against"] == ANOTHER_ORDER]
    told = []
    for model, some in mixed.groupby("model", sort=False):
        count = some["batches"].max()
        at = some[some["batches"] == count].groupby("order")[["overlap", "kept"]].median()
        least, most = at.min(), at.max()
        told.append(
            f"in {model} after {count} batches the overlaps are {least['overlap']:.3f} to "
            f"{most['overlap']:.3f}, and {least['kept']:.1%} to {most['kept']:.1%} of the variance "
            "of other films is kept"
        )
    return (
        f"Order of the batches, {mixed['order'].nunique()} random ones beside the given one: "
        f"{'; '.join(told)} (medians over inputs, range over orders). All batches give the same "
        "in any order."
    )


def moved_ranks(ranks: pd.DataFrame) -> str:
    told = []
    for model, some in ranks.groupby("model", sort=False):
        means = some.groupby("kind")["rank"].mean().sort_values()
        told.append(
            f"{means.index[-1]} gets the most ({means.iloc[-1]:.1f} a layer) and {means.index[0]} "
            f"the least ({means.iloc[0]:.1f}) in {model}"
        )
    return f"Ranks: {'; '.join(told)}."
