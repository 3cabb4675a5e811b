"""What the rows of EVA's claims say in a few sentences, with their figures."""

from __future__ import annotations

import pandas as pd


def discussed(gradients: pd.DataFrame, ranks: pd.DataFrame) -> list[str]:
    return [
        assumption(gradients),
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
    return (
        f"Of the energy that the best A of this rank would hold of a fresh gradient, {told} in the "
        "median: the theorem’s assumption, gradients that are independent of the inputs, is an "
        "approximation."
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
