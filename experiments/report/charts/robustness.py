"""How a comparison depends on a setting: score against learning rate, and against rank."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ..canvas import (
    BAR,
    METHOD,
    RATE,
    SEED_CHOSEN,
    SUBSET_CHOSEN,
    Canvas,
    Chart,
    interval_of,
    log_ticks,
    tooltip,
)
from ..statistics import LEAST_SEEDS, quantile
from ..views import Views

SECTION = "Scores"
# t(0.975) for n seeds at index n. Vega uses the last value for more seeds.
STUDENT = [0.0] * LEAST_SEEDS + [round(quantile(n), 4) for n in range(LEAST_SEEDS, 31)]


def charts(canvas: Canvas, views: Views, covers: str, diverged: list[str]) -> list[Chart]:
    """The charts that have data.

    Args:
        covers: what the intervals of the chosen settings cover, as text.
        diverged: the settings at which runs diverged.
    """
    rows, runs = views.tables["rows"], views.tables["runs"]
    # The curve may show validation scores although the chosen settings have test scores.
    shown = canvas.metric
    if views.curve == "validation_score":
        shown = f"validation {shown.removeprefix('validation ')}"
    missing = f" Not drawn, because they diverged: {', '.join(diverged)}." if diverged else ""
    made = []
    if runs.groupby("arm")["learning_rate"].nunique().max() > 1:
        which = "test score" if views.curve == "score" else "validation score"
        made.append(Chart(
            "robustness", f"{shown.capitalize()} against learning rate",
            f"Line: mean {which} over seeds. Band: 95 % interval of that mean by Student's t, over "
            f"seeds alone ({LEAST_SEEDS} or more). Small dots: the runs. Ring: the chosen "
            f"setting.{missing}",
            robustness(canvas, runs, shown), SECTION, wide=True,
        ))  # fmt: skip
    if rows.groupby(["task", "method"])["rank"].nunique().max() > 1:
        made.append(Chart(
            "rank", f"{canvas.metric.capitalize()} against rank",
            f"Each method at its best learning rate for that rank. The filter of ranks does not "
            f"apply. Bars: 95 % intervals over {covers}.",
            against_rank(canvas, rows), SECTION, over="ranks",
        ))  # fmt: skip
    return made


def robustness(canvas: Canvas, runs: pd.DataFrame, metric: str) -> alt.LayerChart:
    """Mean over seeds at each learning rate with its interval; a ring around the chosen one."""
    runs = runs[runs["curve"].notna()]
    x = alt.X(
        "learning_rate:Q",
        title="learning rate (log)",
        scale=alt.Scale(type="log", nice=False, padding=14),
        axis=alt.Axis(format="~e", values=log_ticks(runs["learning_rate"]), grid=False),
    )
    # The runs set the scale, because intervals of three seeds may extend beyond 0 and 100 %.
    y = alt.Scale(domain=[runs["curve"].min(), runs["curve"].max()], nice=True, padding=8)
    each = canvas.table("runs").transform_filter(f"{SEED_CHOSEN} && isValid(datum.curve)")
    mean = (
        each.transform_aggregate(
            mean="mean(curve)", deviation="stdev(curve)", n="count()",
            groupby=["arm", "method", "task", "learning_rate", "best"],
        )
        .transform_calculate(known=f"datum.n >= {LEAST_SEEDS}")
        .transform_calculate(
            margin=f"datum.known ? {STUDENT}[min(datum.n, {len(STUDENT) - 1})] * datum.deviation"
            " / sqrt(datum.n) : 0"
        )
        .transform_calculate(
            bottom="datum.mean - datum.margin",
            top="datum.mean + datum.margin",
            low="datum.known ? datum.mean - datum.margin : null",
            high="datum.known ? datum.mean + datum.margin : null",
        )
        .encode(
            x=x, color=canvas.color("stroke"),
            detail=[alt.Detail("arm:N"), alt.Detail("task:N")],
        )
    )  # fmt: skip
    value = ("mean:Q", f"{metric}, %, mean over seeds", ".2f")
    tips = tooltip(METHOD, RATE, value, *interval_of("low", "high"), ("n:Q", "seeds"))
    band = mean.mark_area(opacity=0.08, clip=True).encode(
        y=alt.Y("bottom:Q", title=f"{metric}, %", scale=y), y2=alt.Y2("top:Q")
    )  # fmt: skip
    line = mean.mark_line(strokeWidth=2.2).encode(y=alt.Y("mean:Q", scale=y))
    dots = mean.mark_point(filled=True, size=34, opacity=1).encode(y=alt.Y("mean:Q"), tooltip=tips)
    ring = mean.transform_filter("datum.best").mark_point(
        filled=False, size=190, strokeWidth=2.4, opacity=1
    ).encode(y=alt.Y("mean:Q"), tooltip=tips)  # fmt: skip
    small = each.mark_point(filled=True, size=12, opacity=0.35).encode(
        x=x, y=alt.Y("curve:Q"), color=canvas.color("stroke"),
        tooltip=canvas.run_tooltip(("curve:Q", f"{metric}, %", ".2f")),
    )  # fmt: skip
    return canvas.finish(alt.layer(band, small, line, dots, ring), 340, legend=True)


def against_rank(canvas: Canvas, rows: pd.DataFrame) -> alt.LayerChart:
    """Score of each method's best learning rate at each rank."""
    every_rank = SUBSET_CHOSEN.replace("indexof(ranks, datum.rank) >= 0 && ", "")
    ranks = sorted(float(rank) for rank in rows["rank"].unique() if rank > 0)
    base = (
        canvas.table("rows")
        .transform_filter(every_rank)
        .transform_calculate(**BAR)
        .encode(
            x=alt.X(
                "rank:Q", title="rank (log)",
                scale=alt.Scale(type="log", base=2, nice=False, padding=18),
                axis=alt.Axis(values=ranks, grid=False),
            ),
            color=canvas.color("stroke"),
            detail=alt.Detail("series:N"),
        )
    )  # fmt: skip
    interval = base.mark_rule(strokeWidth=2.5, opacity=0.5).encode(
        y=alt.Y("bottom:Q", title=f"{canvas.metric}, %", scale=alt.Scale(zero=False, padding=10)),
        y2=alt.Y2("top:Q"),
    )
    line = base.mark_line(strokeWidth=2).encode(y=alt.Y("score:Q"))
    point = base.mark_point(filled=True, size=60, opacity=1).encode(
        y=alt.Y("score:Q"), tooltip=canvas.score_tooltip()
    )
    return canvas.finish(alt.layer(interval, line, point), 300, legend=True)
