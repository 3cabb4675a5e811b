"""Which charts a report has: all those with data."""

from __future__ import annotations

from altair.utils.schemapi import debug_mode

from .canvas import Canvas, Chart
from .charts import fronts, layers, power, robustness, scores, spectra, training, verdicts
from .palette import marks, ordered
from .summary import Summarizer
from .views import Views


def draw(
    summarizer: Summarizer,
    views: Views,
    majority: dict[str, float],
    metric: str,
    diverged: list[str],
) -> tuple[list[Chart], Canvas]:
    """All charts in the order of the page, and their canvas."""
    canvas = make_canvas(summarizer, views, metric)
    covers = " or ".join(sorted({row.interval for row in summarizer.all_rows()} - {"no interval"}))
    covers = covers or "seeds"
    # Altair would validate every part, although the page validates the whole again.
    with debug_mode(False):
        drawn: list[Chart] = [
            *verdicts.charts(canvas, views),
            *fronts.charts(canvas, views),
            *power.charts(canvas, views),
            *robustness.charts(canvas, views, diverged),
            *scores.charts(canvas, views, {task: 100 * m for task, m in majority.items()}, covers),
            *training.charts(canvas, views),
            *layers.charts(canvas, views),
            *spectra.charts(canvas, views),
        ]
    return drawn, canvas


def make_canvas(summarizer: Summarizer, views: Views, metric: str) -> Canvas:
    """The filters offer the values of all runs.

    Initially they show one rank and one task, because too many lines cannot be distinguished.
    """
    runs = views.tables["runs"]
    methods = ordered(set(runs["method"]))
    filters = {
        "methods": methods,
        "ranks": sorted(runs["rank"].unique().tolist()),
        "tasks": sorted(runs["task"].unique()),
    }
    initial = dict(filters)
    chosen = views.tables["rows"]
    if chosen.groupby(["task", "method"])["rank"].nunique().max() > 1:
        initial["ranks"] = [float(chosen.groupby("rank")["arm"].size().idxmax())]
    if len(filters["tasks"]) > 1:
        initial["tasks"] = filters["tasks"][:1]
    arms = list(dict.fromkeys(row.arm for row in summarizer.all_rows()))
    return Canvas(arms, marks(methods), metric, filters, initial)
