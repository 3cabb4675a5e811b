"""Starts compared seed by seed, each at the best of several learning rates.

The first seed of a start tries rates until the best one has a neighbor on both sides. The other
seeds repeat the best rate. Only they are compared, because the first seed chose the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

from .claim import Claim, Verdict
from .classifier_training import TrainingOptions
from .drawing import color, plot
from .interval import Interval, mean
from .reproduction import Figure, Measurement, Table

SEARCHED = "the first seed searches; the others repeat the best rate and are compared"
BY = ("published claim", "our own question")


@dataclass(frozen=True)
class Comparison:
    """A claim that one start reaches a lower loss than another."""

    statement: str
    arm: str
    other: str
    paper: str = "– (a control of this project)"
    published: bool = False


def rows_of(
    options: TrainingOptions, name: str, measure: Callable[[float, int], Mapping[str, Any] | None]
) -> list[dict[str, Any]]:
    """Rows of one arm: each rate that the first seed tried, then the best one with other seeds.

    Args:
        measure: by rate and seed, figures of a trained model, "loss" among them; None if the
            training diverged.
    """
    rows = []

    def trained(rate: float, seed: int, compared: bool) -> float:
        found = dict(measure(rate, seed) or {"loss": math.inf})
        rows.append({"arm": name, "rate": rate, "seed": seed, "compared": compared} | found)
        return found["loss"]

    best = search(lambda rate: trained(rate, options.seed, False), options.rates)
    for seed in range(options.seed + 1, options.seed + 1 + options.repeats):
        trained(best, seed, True)
    return rows


def search(loss: Callable[[float], float], rates: Sequence[float]) -> float:
    """The best rate, from the middle of `rates` on, until it has a tried neighbor on both sides."""
    found: dict[int, float] = {}
    place = len(rates) // 2
    while True:
        for index in (place, place - 1, place + 1):
            if 0 <= index < len(rates) and index not in found:
                found[index] = loss(rates[index])
        best = min(found, key=found.__getitem__)
        if best == place:
            return rates[best]
        place = best


def differences(rows: pd.DataFrame, arm: str, other: str, measure: str = "loss") -> Interval:
    """The measure of `other` minus that of `arm`, paired by seed: above 0 if `arm` has less."""
    compared = rows[rows["compared"].astype(bool)]
    table = compared.pivot_table(index="seed", columns="arm", values=measure)
    return mean((table[other] - table[arm]).to_numpy())


def resolved(difference: Interval) -> Verdict:
    """The verdict on a claim that a difference is above 0."""
    if difference.above_zero:
        return Verdict.REPRODUCED
    return Verdict.CONTRADICTS if difference.below_zero else Verdict.NOT_RESOLVED


def edges(rows: pd.DataFrame, rates: Sequence[float]) -> list[str]:
    """The arms that are best at the lowest or highest rate."""
    best = rows[rows["compared"].astype(bool)].groupby("arm", sort=False)["rate"].first()
    return [str(name) for name, rate in best.items() if rate in (rates[0], rates[-1])]


def compare(comparison: Comparison, measured: Measurement) -> Claim:
    """The paired differences of two arms in the loss, which decides, and in the accuracy."""
    rows, arm, other = measured["trainings"], comparison.arm, comparison.other
    loss = differences(rows, arm, other)
    at_edges = [name for name in edges(rows, measured.options.rates) if name in (arm, other)]
    return Claim(
        statement=comparison.statement,
        paper=comparison.paper,
        ours=f"loss of {other} minus that of {arm}: {loss.show('+.4f')} nats; accuracy "
        f"{differences(rows, other, arm, 'accuracy').show('+.1%')}",
        criterion="the difference of the losses is above 0 beyond its 95 % interval over seeds; "
        "contradicts: below 0 beyond it; else not resolved",
        verdict=resolved(loss),
        remark=f"Best at the edge of the rates: {', '.join(at_edges)}." if at_edges else "",
        published=comparison.published,
    )


def losses_table(measured: Measurement, title: str, *also: str, note: str = "") -> Table:
    """The means over the compared seeds, by arm, the lowest loss first.

    Args:
        also: more measures than the loss and the accuracy.
    """
    found = []
    rows = measured["trainings"]
    for name, some in rows[rows["compared"].astype(bool)].groupby("arm", sort=False):
        row = {"start": name, "rate": f"{some['rate'].iloc[0]:g}", "loss": some["loss"].mean()}
        row["95 % interval"] = mean(some["loss"].to_numpy()).show(".4f")
        found.append(row | some[["accuracy", *also]].mean().to_dict())
    frame = pd.DataFrame(found).sort_values("loss", ignore_index=True)
    formats = dict.fromkeys(["loss", *also], ".4f") | {"accuracy": ".1%"}
    return Table("losses", f"{title} at the best rate", frame, formats, note)


def differences_figure(measured: Measurement, comparisons: Sequence[Comparison]) -> Figure:
    """The differences that decide the claims."""
    rows = measured["trainings"]
    cells = []
    for one in comparisons:
        difference = differences(rows, one.arm, one.other)
        cells.append(
            {
                "comparison": f"{one.arm} – {one.other}",
                "gain": difference.value,
                "low": difference.low,
                "high": difference.high,
                "by": BY[not one.published],
            }
        )
    drawing = plot(
        pd.DataFrame(cells),
        "point",
        alt.X("gain:Q", title="lower loss of the first start, nats"),
        alt.Y("comparison:N", sort=None, axis=alt.Axis(title=None, labelLimit=330)),
        color=color("by", BY),
        interval=("low", "high"),
        level=0,
        height=alt.Step(30),
    )
    return Figure(
        "differences",
        "How much lower the loss of the first start is",
        "Paired by seed, with 95 % intervals. An interval that crosses zero decides nothing.",
        drawing,
    )
