"""Forgetting against what is learned: tables and the chart."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import pandas as pd

from ...report.canvas import SOFT
from ...report.palette import MARKS
from ..drawing import chart
from ..reproduction import Figure, Table
from .claims import LABELS
from .tradeoff import ARRAYS, SHARES

COLORS = {
    "kaiming": MARKS["kaiming"].color,
    "corda_kpm": MARKS["corda"].color,
    "corda_ipm": "#882255",
    "pissa": MARKS["pissa"].color,
}


def equal_tables(equal: Mapping[float, pd.DataFrame], fall: float) -> list[Table]:
    """What each start forgets where all have learned the same; the most learned comes first."""
    return [
        Table(
            f"equal_{100 * share:.0f}",
            f"Forgetting where every start has learned {share * fall:.3f} nats",
            equal_rows(found),
            {"perplexity of plots": ".2f"},
            note="KL(original ‖ trained) of the next token on held-out plots, nats; over seeds, "
            "each at the rate whose KL is least.",
        )
        for share, found in sorted(equal.items(), reverse=True)
    ]


def equal_rows(found: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "start": LABELS[method],
            "best rate": ", ".join(f"{rate:g}" for rate in sorted(set(some["rate"]))),
            "KL, mean": some["divergence"].mean(),
            "least": some["divergence"].min(),
            "most": some["divergence"].max(),
            "perplexity of plots": some["perplexity"].mean(),
        }
        for method, some in found.groupby("method", sort=False)
    )


def end_table(steps: pd.DataFrame) -> Table:
    last = steps[steps["step"] == steps["step"].max()]
    found = (
        last.groupby(["method", "rate"], sort=False)[["fall", "divergence", "perplexity"]]
        .mean()
        .reset_index()
    )
    return Table(
        "end", "After the last step, by learning rate",
        pd.DataFrame(
            {
                "start": found["method"].map(LABELS),
                "rate": found["rate"].map("{:g}".format),
                "learned, nats": found["fall"],
                "KL, nats": found["divergence"],
                "perplexity of plots": found["perplexity"],
            }
        ),
        {"learned, nats": ".3f", "perplexity of plots": ".2f"},
        note="Means over the seeds that were trained at that rate: the first at every one, the "
        "others at those that won with it. A training that diverged has no row.",
    )  # fmt: skip


def tradeoff_figure(steps: pd.DataFrame, fall: float) -> Figure:
    drawn = (
        steps.drop(columns=ARRAYS)
        .assign(
            label=steps["method"].map(LABELS),
            run=steps["method"] + steps["rate"].map(" {:g} ".format) + steps["seed"].astype(str),
            distance=steps["divergence"] ** 0.5,
        )
        .sort_values(["run", "step"])
    )
    present = [method for method in LABELS if method in set(steps["method"])]
    color = alt.Color(
        "label:N",
        scale=alt.Scale(
            domain=[LABELS[m] for m in present], range=[COLORS[m] for m in present]
        ),
        legend=alt.Legend(title=None, orient="bottom", symbolOpacity=1),
    )  # fmt: skip
    base = chart(drawn).encode(
        x=alt.X("fall:Q", title="learned: fall of the loss on held-out problems, nats"),
        y=alt.Y("distance:Q", title="forgotten: √KL on held-out plots, √nats"),
        color=color,
        detail="run:N",
        tooltip=[
            alt.Tooltip("label:N", title="start"),
            alt.Tooltip("rate:Q", format="g"),
            "seed:N",
            "step:Q",
            alt.Tooltip("fall:Q", format=".3f"),
            alt.Tooltip("divergence:Q", title="KL", format=".3g"),
            alt.Tooltip("perplexity:Q", format=".2f"),
        ],
    )
    layers = [
        base.mark_line(opacity=0.75).encode(order="step:Q"),
        base.mark_point(filled=True, size=30, opacity=1),
    ]
    if fall > 0:
        rule = chart(pd.DataFrame({"fall": [share * fall for share in SHARES]})).mark_rule(
            color=SOFT, strokeDash=[4, 3], tooltip=None
        )
        layers.insert(0, rule.encode(x="fall:Q"))
    return Figure(
        "tradeoff", "What is forgotten for what is learned",
        "A line a training, from the origin; low and to the right is good. Starts are compared on "
        "the dashed lines: at what all have learned, and at half of it.",
        alt.layer(*layers).properties(height=340),
    )  # fmt: skip
