"""The chosen settings: scores, and a mean over tasks."""

from __future__ import annotations

import altair as alt

from ..canvas import (
    BAR,
    FEW_TICKS,
    METHOD,
    OVER_TASKS,
    RUN_CHOSEN,
    SOFT,
    SUBSET_CHOSEN,
    Canvas,
    Chart,
    interval_of,
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
    made = [Chart(
        "score", f"{canvas.metric.capitalize()} at the chosen setting",
        f"Large dot: mean over seeds. Bar: 95 % interval over {covers}. Small circles: the runs.",
        score(canvas, majority), SECTION,
    )]  # fmt: skip
    tasks = views.tables["tasks"]
    if len(tasks):
        made.append(Chart(
            "tasks", f"Interquartile mean over {int(tasks['tasks'].iloc[0])} tasks",
            "Mean of the middle half of the scores of all tasks and seeds, not normalized, with a "
            "95 % bootstrap interval stratified by task (Agarwal et al. 2021, arXiv 2108.13264).",
            over_tasks(canvas), SECTION, over="tasks",
        ))  # fmt: skip
    return made


def score(canvas: Canvas, majority: dict[str, float]) -> alt.LayerChart:
    """Mean and 95 % interval per arm, a small dot per run, the majority class dashed."""
    base = canvas.table("rows").transform_filter(SUBSET_CHOSEN).transform_calculate(**BAR)
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


def over_tasks(canvas: Canvas) -> alt.LayerChart:
    """The interquartile mean over tasks of each arm."""
    base = canvas.table("tasks").transform_filter(OVER_TASKS)
    base = base.encode(y=canvas.rows(), color=canvas.color(None))
    value = ("score:Q", "interquartile mean, %", ".2f")
    tips = tooltip(METHOD, value, *interval_of("low", "high"), ("runs:Q", "runs"))
    x = alt.X("low:Q", title="interquartile mean, %", scale=alt.Scale(zero=False, padding=12))
    interval = canvas.bars(base, x, "high", tips)
    mean = base.mark_point(filled=True, size=95, opacity=1).encode(x=alt.X("score:Q"), tooltip=tips)
    return canvas.finish(alt.layer(interval, mean), alt.Step(34))
