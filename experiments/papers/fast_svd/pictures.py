"""Rows -> charts."""

from __future__ import annotations

import altair as alt
import pandas as pd

from experiments.papers.drawing import chart
from experiments.papers.fast_svd.decomposing import LOWRANK, NITER, PISSA
from experiments.papers.fast_svd.judging import NO_NITER, summary
from experiments.papers.fast_svd.settings import PAPER_ERRORS
from experiments.papers.fast_svd.starts import EXACT, Training
from experiments.papers.findings import Figure
from experiments.report.canvas import INK, SOFT
from experiments.report.palette import MARKS

THE_PAPER = "the paper, r = 128"
COLORS = {LOWRANK: "#0072b2", NITER: "#e69f00", PISSA: MARKS["pissa"].color, THE_PAPER: INK}
HEADER = alt.Header(labelColor=SOFT, labelFontSize=12.5, title=None, labelAnchor="start")
PANEL = 250
SMALLEST = 1e-8
"""A logarithmic axis has no place for an excess error of rounding, or of none."""


def figures(rows: pd.DataFrame, training: Training) -> list[Figure]:
    found = summary(rows)
    judged = found[found["judged"]]
    return [
        Figure(
            "error", "The error against the number of iterations",
            "Mean absolute difference of the entries of A and B from the full SVD’s, as a multiple "
            "of svd_lowrank’s at niter 1, so that the paper’s two figures (in a unit of their own) "
            "stand beside it. "
            "`pissa`, drawn as a rule, has no niter.",
            by_niter(judged), width=None,
        ),
        Figure(
            "cost", "What accuracy costs: excess error against time",
            "Both as shares of the full SVD’s; numbers are niter. To the lower left is better.",
            by_cost(judged), width=None,
        ),
        Figure(
            "training", "Loss from a fast start, less that from the exact one",
            "Training loss of each step, a line a draw; the steps’ texts are the same for all.",
            by_step(training.steps),
        ),
    ]  # fmt: skip


def color(methods: list[str], columns: int = 2) -> alt.Color:
    scale = alt.Scale(domain=methods, range=[COLORS[method] for method in methods])
    return alt.Color(
        "method:N", scale=scale, legend=alt.Legend(title=None, orient="bottom", columns=columns)
    )


def by_niter(judged: pd.DataFrame) -> alt.FacetChart:
    first = judged[(judged["method"] == LOWRANK) & (judged["niter"] == 1)]
    unit = first.set_index("source")["entries"]
    frame = judged[["source", "method", "niter", "entries"]].copy()
    frame["relative"] = frame["entries"] / frame["source"].map(unit)
    papers = [
        {"source": source, "method": THE_PAPER, "niter": niter, "entries": error,
         "relative": error / PAPER_ERRORS[1]}
        for source in frame["source"].unique()
        for niter, error in PAPER_ERRORS.items()
    ]  # fmt: skip
    frame = pd.concat([frame, pd.DataFrame(papers)])
    niters = sorted(frame.loc[frame["niter"] >= 0, "niter"].unique())
    tips = ["method:N", "niter:O", alt.Tooltip("entries:Q", format=".2e")]
    base = alt.Chart().encode(
        y=alt.Y(
            "relative:Q", scale=alt.Scale(type="log"), title="error, niter 1 = 1",
            axis=alt.Axis(format=".0e", tickCount=6),
        ),
        color=color([LOWRANK, NITER, PISSA, THE_PAPER]),
        tooltip=tips,
    )  # fmt: skip
    lines = (
        base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=45))
        .encode(x=alt.X("niter:O", scale=alt.Scale(domain=niters), axis=alt.Axis(labelAngle=0)))
        .transform_filter(f"datum.niter != {NO_NITER}")
    )
    rule = base.mark_rule(strokeWidth=2).transform_filter(f"datum.niter == {NO_NITER}")
    return _faceted(alt.layer(lines, rule, data=chart(frame).data).properties(height=240), frame)


def by_cost(judged: pd.DataFrame) -> alt.FacetChart:
    frame = judged[["source", "method", "niter", "share", "excess"]].copy()
    frame["percent"] = 100 * frame["share"]
    frame["excess"] = frame["excess"].clip(lower=SMALLEST)
    frame["label"] = frame["niter"].astype(str).where(frame["niter"] != NO_NITER, "pissa")
    tips = ["method:N", "label:N", alt.Tooltip("percent:Q", format=".2f"),
            alt.Tooltip("excess:Q", format=".1e")]  # fmt: skip
    base = alt.Chart().encode(
        x=alt.X("percent:Q", scale=alt.Scale(type="log"), title="time, % of the full SVD’s",
                axis=alt.Axis(grid=False, format="~g", tickCount=4)),
        y=alt.Y("excess:Q", scale=alt.Scale(type="log"), title="excess Frobenius error",
                axis=alt.Axis(format=".0e", tickCount=6)),
        color=color([LOWRANK, NITER, PISSA]),
        order="niter:Q",
        tooltip=tips,
    )  # fmt: skip
    lines = base.mark_line(strokeWidth=1.5, point=alt.OverlayMarkDef(size=45))
    words = base.mark_text(dx=5, dy=-8, fontSize=11, align="left").encode(text="label:N")
    return _faceted(alt.layer(lines, words, data=chart(frame).data).properties(height=250), frame)


def _faceted(layered: alt.LayerChart, frame: pd.DataFrame) -> alt.FacetChart:
    by_source = alt.Facet("source:N", header=HEADER, sort=list(frame["source"].unique()))
    return layered.properties(width=PANEL).facet(by_source, columns=2)


def by_step(steps: pd.DataFrame) -> alt.LayerChart:
    exact = steps[steps["start"] == EXACT].set_index("step")["loss"]
    frame = steps[steps["start"] != EXACT].copy()
    frame["above"] = frame["loss"] - frame["step"].map(exact)
    frame["run"] = frame["start"] + ", draw " + (frame["draw"] + 1).astype(str)
    order = list(frame["start"].unique())
    zero = alt.Chart(chart(pd.DataFrame([{"above": 0.0}])).data).mark_rule(color=SOFT)
    lines = (
        chart(frame[["start", "run", "step", "above"]])
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=30))
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, grid=False)),
            y=alt.Y("above:Q", title="loss minus the exact start’s, nats"),
            color=alt.Color(
                "start:N", sort=order, scale=alt.Scale(scheme="viridis", reverse=True),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            detail="run:N",
            tooltip=["run:N", "step:Q", alt.Tooltip("above:Q", format="+.4f")],
        )
    )  # fmt: skip
    return alt.layer(zero.encode(y="above:Q"), lines).properties(height=260)
