"""Scores at the chosen settings: by method, against the seconds of the start, against the rank."""

from __future__ import annotations

import altair as alt

from ..canvas import (
    ARM_CHOSEN,
    BAR,
    FEW_TICKS,
    RUN_CHOSEN,
    SOFT,
    Canvas,
    Chart,
    log_ticks,
    tooltip,
)
from ..views import Views

SECTION = "Scores"


def charts(canvas: Canvas, views: Views, majority: dict[str, float], covers: str) -> list[Chart]:
    """The charts that have data.

    Args:
        majority: by task, the score of always answering the majority class, in percent.
        covers: what the intervals of the chosen settings cover, as text.
    """
    rows = views.tables["rows"]
    bars = f"Bars: 95 % intervals over {covers}."
    made = [Chart(
        "score", f"{canvas.metric.capitalize()} at the chosen setting",
        f"Large dot: mean over seeds. Small circles: the runs. {bars}",
        score(canvas, majority), SECTION,
    )]  # fmt: skip
    ranks = sorted(float(rank) for rank in rows["rank"].unique() if rank > 0)
    if rows.groupby(["task", "method"])["rank"].nunique().max() > 1:
        made.append(Chart(
            "rank", f"{canvas.metric.capitalize()} against rank",
            "Each method at its best learning rate for that rank. The filter of ranks does not "
            f"apply. {bars}",
            against(canvas, "rank", "rank", 2, ranks, line=True), SECTION, every_rank=True,
        ))  # fmt: skip
    if (rows["init_seconds"] > 0).any():
        made.append(Chart(
            "cost", f"{canvas.metric.capitalize()} against the seconds of the start",
            f"Seconds: mean over seeds. {bars}",
            against(canvas, "init_seconds", "seconds to initialize", 10,
                    log_ticks(rows["init_seconds"]), line=False), SECTION,
        ))  # fmt: skip
    return made


def score(canvas: Canvas, majority: dict[str, float]) -> alt.LayerChart:
    """Mean and 95 % interval per arm, a small dot per run, the majority class dashed."""
    base = canvas.table("rows").transform_filter(ARM_CHOSEN).transform_calculate(**BAR)
    base = base.encode(y=canvas.rows(), color=canvas.color(None))
    x = alt.X(
        "bottom:Q",
        title=f"{canvas.metric}, %",
        scale=alt.Scale(zero=False, padding=12),
        axis=alt.Axis(tickCount=FEW_TICKS),
    )
    interval = canvas.bars(base, x, "top", canvas.score_tooltip())
    mean = base.mark_point(filled=True, size=95, opacity=1).encode(
        x=alt.X("score:Q"), tooltip=canvas.score_tooltip()
    )
    each = (
        canvas.table("runs")
        .transform_filter(f"{RUN_CHOSEN} && isValid(datum.score)")
        .mark_point(size=24, yOffset=9, opacity=0.9, strokeWidth=1.4)
        .encode(
            y=canvas.rows(),
            x=alt.X("score:Q"),
            color=canvas.color(None),
            tooltip=canvas.run_tooltip(("score:Q", f"{canvas.metric}, %", ".2f")),
        )
    )
    layers = [interval, each, mean]
    if majority:
        values = [{"task": task, "majority": value} for task, value in majority.items()]
        guess = alt.Chart(alt.InlineData(values=values))
        guess = guess.transform_filter("indexof(tasks, datum.task) >= 0")
        label = "'majority class ' + format(datum.majority, '.1f') + ' %'"
        layers += [
            guess.mark_rule(strokeDash=[5, 4], color=SOFT).encode(x=alt.X("majority:Q")),
            guess.transform_calculate(label=label)
            .mark_text(align="left", dx=5, dy=-7, color=SOFT, fontSize=12)
            .encode(x=alt.X("majority:Q"), y=alt.value(0), text=alt.Text("label:N")),
        ]
    return canvas.finish(alt.layer(*layers), alt.Step(34))


def against(
    canvas: Canvas, field: str, title: str, base: int, ticks: list[float], line: bool
) -> alt.LayerChart:
    """The score with its interval against a field on a logarithmic axis.

    Args:
        base: of the logarithm.
        line: whether a method's points are joined over all ranks.
    """
    shown = ARM_CHOSEN.replace("indexof(ranks, datum.rank) >= 0", "true") if line else ARM_CHOSEN
    drawing = (
        canvas.table("rows")
        .transform_filter(f"{shown} && datum.{field} > 0")
        .transform_calculate(**BAR)
        .encode(
            x=alt.X(
                f"{field}:Q", title=f"{title} (log)",
                scale=alt.Scale(type="log", base=base, nice=False, padding=18),
                axis=alt.Axis(format="~g", values=ticks, grid=not line),
            ),
            color=canvas.color("stroke" if line else "symbol"),
            detail=alt.Detail("series:N"),
        )
    )  # fmt: skip
    interval = drawing.mark_rule(strokeWidth=2.5, opacity=0.5).encode(
        y=alt.Y("bottom:Q", title=f"{canvas.metric}, %", scale=alt.Scale(zero=False, padding=10)),
        y2=alt.Y2("top:Q"),
    )
    tips = [*canvas.score_tooltip(), *tooltip((f"{field}:Q", title, ".3~g"))]
    point = drawing.mark_point(filled=True, size=90, opacity=1).encode(
        y=alt.Y("score:Q"), tooltip=tips
    )
    if not line:
        point = point.encode(shape=canvas.shape())
    lines = [drawing.mark_line(strokeWidth=2).encode(y=alt.Y("score:Q"))] if line else []
    return canvas.finish(alt.layer(interval, *lines, point), 300, legend=True)
