"""How a comparison depends on the learning rate."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ..canvas import ARM_CHOSEN, METHOD, RATE, Canvas, Chart, interval_of, log_ticks, tooltip
from ..statistics import LEAST_SEEDS
from ..views import Views
from .scores import SECTION


def charts(canvas: Canvas, views: Views, diverged: list[str]) -> list[Chart]:
    """The chart, if a method ran at several learning rates.

    Args:
        diverged: the settings at which runs diverged.
    """
    runs = views.tables["runs"]
    if runs.groupby("arm")["learning_rate"].nunique().max() <= 1:
        return []
    # The curve may show validation scores although the chosen settings have test scores.
    which, shown = "test score", canvas.metric
    if views.curve == "validation_score":
        which, shown = "validation score", f"validation {shown.removeprefix('validation ')}"
    missing = f" Not drawn, because they diverged: {', '.join(diverged)}." if diverged else ""
    return [Chart(
        "robustness", f"{shown.capitalize()} against learning rate",
        f"Line: mean {which} over seeds. Band: 95 % interval of that mean by Student's t, over "
        f"seeds alone ({LEAST_SEEDS} or more). Small dots: the runs. Ring: the chosen "
        f"setting.{missing}",
        robustness(canvas, runs, shown), SECTION, wide=True,
    )]  # fmt: skip


def robustness(canvas: Canvas, runs: pd.DataFrame, metric: str) -> alt.LayerChart:
    """Mean over seeds at each learning rate with its interval; a ring around the chosen one."""
    x = alt.X(
        "learning_rate:Q",
        title="learning rate (log)",
        scale=alt.Scale(type="log", nice=False, padding=14),
        axis=alt.Axis(format="~e", values=log_ticks(runs["learning_rate"]), grid=False),
    )
    # The runs set the scale, because intervals of three seeds may extend beyond 0 and 100 %.
    y = alt.Scale(domain=[runs["curve"].min(), runs["curve"].max()], nice=True, padding=8)
    mean = (
        canvas.table("robustness")
        .transform_filter(ARM_CHOSEN)
        .transform_calculate(
            bottom="isValid(datum.low) ? datum.low : datum.mean",
            top="isValid(datum.high) ? datum.high : datum.mean",
        )
        .encode(
            x=x, color=canvas.color("stroke"),
            detail=[alt.Detail("arm:N"), alt.Detail("task:N")],
        )
    )  # fmt: skip
    value = ("mean:Q", f"{metric}, %, mean over seeds", ".2f")
    tips = tooltip(METHOD, RATE, value, *interval_of("low", "high"), ("seeds:Q", "seeds"))
    band = mean.mark_area(opacity=0.08, clip=True).encode(
        y=alt.Y("bottom:Q", title=f"{metric}, %", scale=y), y2=alt.Y2("top:Q")
    )
    line = mean.mark_line(strokeWidth=2.2).encode(y=alt.Y("mean:Q", scale=y))
    dots = mean.mark_point(filled=True, size=34, opacity=1).encode(y=alt.Y("mean:Q"), tooltip=tips)
    ring = mean.transform_filter("datum.best").mark_point(
        filled=False, size=190, strokeWidth=2.4, opacity=1
    ).encode(y=alt.Y("mean:Q"), tooltip=tips)  # fmt: skip
    each = canvas.table("runs").transform_filter(f"{ARM_CHOSEN} && isValid(datum.curve)")
    small = each.mark_point(filled=True, size=12, opacity=0.35).encode(
        x=x, y=alt.Y("curve:Q"), color=canvas.color("stroke"),
        tooltip=canvas.run_tooltip(("curve:Q", f"{metric}, %", ".2f")),
    )  # fmt: skip
    return canvas.finish(alt.layer(band, small, line, dots, ring), 340, legend=True)
