"""The table, the paper's figure with the paper's own points, and what calibration changes."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ...report.palette import MARKS
from ..drawing import chart
from ..reproduction import Figure, Table
from .claims import (
    LABELS,
    PAPER,
    PAPER_FRACTIONS,
    PAPER_FULL,
    PAPER_WIDTH,
)

OURS, THEIRS = "ours", "the paper’s"
# Plain SVD drops what PiSSA leaves: its color.
COLORS = {
    "plain": MARKS["pissa"].color,
    "asvd": "#44aa99",
    "corda": MARKS["corda"].color,
    "whitened": "#332288",
}
CALIBRATIONS = ("plots, many", "plots, few", "problems, many")
STROKES = {
    "orient": "bottom", "columns": 3, "symbolType": "stroke", "symbolSize": 500,
    "symbolStrokeWidth": 2, "symbolStrokeColor": "#57606a",
}  # fmt: skip


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %"


def table(frame: pd.DataFrame, full: float) -> Table:
    rows = []
    for (method, corpus, tokens), some in frame.groupby(["method", "corpus", "tokens"], sort=False):
        row = {"method": LABELS[method], "calibrated on": corpus, "tokens": str(tokens or "–")}
        row |= {percent(r.fraction): r.perplexity for r in some.itertuples()}
        rows.append(row | {"± nats at the last": some["error"].iloc[-1]})
    columns = list(rows[0])[3:-1]
    theirs = "; ".join(
        f"{LABELS[method]} {', '.join(f'{value:g}' for value in values)}"
        for method, values in PAPER.items()
    )
    return Table(
        "perplexity",
        f"Perplexity by the share of components dropped (whole model: {full:.2f})",
        pd.DataFrame(rows),
        dict.fromkeys(columns, ".4g") | {"± nats at the last": ".2f"},
        note="The paper’s, at "
        + ", ".join(map(percent, PAPER_FRACTIONS))
        + f" of Llama-2-7B (whole: {PAPER_FULL}): {theirs}. The last column is the standard error "
        "of the loss above the whole model’s, over blocks, where most is dropped.",
    )


def charts(frame: pd.DataFrame, full: float, width: int) -> list[Figure]:
    many = frame["tokens"].max()
    own = frame[(frame["method"] == "plain") | (frame["tokens"] == many)]
    own = own[own["corpus"].isin(["–", frame.loc[frame["method"] == "asvd", "corpus"].iloc[0]])]
    compared = [
        {"model": OURS, "label": LABELS[r.method], "fraction": r.fraction,
         "ratio": r.perplexity / full, "perplexity": r.perplexity}
        for r in own.itertuples()
    ]  # fmt: skip
    compared += [
        {"model": THEIRS, "label": LABELS[method], "fraction": fraction,
         "ratio": value / PAPER_FULL, "perplexity": value}
        for method, values in PAPER.items()
        for fraction, value in zip(PAPER_FRACTIONS, values, strict=True)
    ]  # fmt: skip
    return [
        Figure(
            "fractions", "Perplexity against the share of components dropped",
            "Relative to the whole model; both axes logarithmic. Solid: this model, of width "
            f"{width:,}, on film plots. Dashed: the paper’s table, Llama-2-7B, of width "
            f"{PAPER_WIDTH:,}, on WikiText-2.", fraction_chart(pd.DataFrame(compared)),
        ),
        Figure(
            "calibration", "What the calibration data change",
            "CorDA and the whitened SVD, calibrated on plots of other films (many tokens and few) "
            "and on word problems.", calibration_chart(frame, full),
        ),
    ]  # fmt: skip


def color(methods: list[str]) -> alt.Color:
    scale = alt.Scale(
        domain=[LABELS[m] for m in methods], range=[COLORS[m] for m in methods]
    )  # fmt: skip
    legend = alt.Legend(title=None, orient="bottom", symbolOpacity=1, columns=4)
    return alt.Color("label:N", scale=scale, legend=legend)


def axes(frame: pd.DataFrame) -> dict:
    values = sorted(set(frame["fraction"]))
    return {
        "x": alt.X(
            "fraction:Q", scale=alt.Scale(type="log", nice=False, padding=16),
            title="share of components dropped",
            axis=alt.Axis(values=values, format=".2~%"),
        ),
        "y": alt.Y(
            "ratio:Q", scale=alt.Scale(type="log", nice=False, padding=12),
            title="perplexity / that of the whole model",
        ),
        "tooltip": [
            "label:N",
            alt.Tooltip("fraction:Q", format=".2%"),
            alt.Tooltip("perplexity:Q", format=".4g"),
        ],
    }  # fmt: skip


def fraction_chart(frame: pd.DataFrame) -> alt.Chart:
    dash = alt.StrokeDash(
        "model:N", scale=alt.Scale(domain=[OURS, THEIRS], range=[[1, 0], [5, 4]]),
        legend=alt.Legend(title=None, **STROKES),
    )  # fmt: skip
    return (
        chart(frame)
        .mark_line(point=alt.OverlayMarkDef(size=35, filled=True))
        .encode(color=color(list(LABELS)), strokeDash=dash, **axes(frame))
        .properties(height=320)
    )


def calibration_chart(frame: pd.DataFrame, full: float) -> alt.Chart:
    own = frame.loc[frame["method"] == "asvd", "corpus"].iloc[0]
    many = frame["tokens"].max()
    some = frame[frame["method"].isin(["corda", "whitened"])]
    rows = [
        {
            "label": LABELS[r.method],
            "calibration": CALIBRATIONS[2 if r.corpus != own else 0 if r.tokens == many else 1],
            "fraction": r.fraction,
            "ratio": r.perplexity / full,
            "perplexity": r.perplexity,
        }
        for r in some.itertuples()
    ]
    dash = alt.StrokeDash(
        "calibration:N", scale=alt.Scale(domain=CALIBRATIONS, range=[[1, 0], [2, 3], [7, 4]]),
        legend=alt.Legend(title=None, **STROKES),
    )  # fmt: skip
    drawn = pd.DataFrame(rows)
    base = chart(drawn).encode(color=color(["corda", "whitened"]), **axes(drawn))
    return alt.layer(
        base.mark_line().encode(strokeDash=dash),
        base.mark_point(filled=True, size=35, opacity=1),
    ).properties(height=300)
