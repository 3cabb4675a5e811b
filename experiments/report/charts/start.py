"""The cost of a start, its first gradient and its size."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ..canvas import (
    BAR,
    METHOD,
    RATE,
    RUN_CHOSEN,
    SEED_CHOSEN,
    SUBSET_CHOSEN,
    Canvas,
    Chart,
    log_ticks,
    tooltip,
    wants_log,
)
from ..views import Views

SECTION = "Costs and side effects"


def charts(canvas: Canvas, views: Views) -> list[Chart]:
    """The charts that have data."""
    rows, runs = views.tables["rows"], views.tables["runs"]
    made = []
    if (rows["init_seconds"] > 0).any():
        made.append(Chart(
            "cost", "Cost of the start against score",
            "Seconds to initialize, calibration included, on a logarithmic axis. "
            "Bars: 95 % intervals of the score.",
            cost(canvas, rows), SECTION,
        ))  # fmt: skip
    gradients = runs["first_step_gradient_norm"]
    if gradients.notna().any():
        log = wants_log(gradients)
        made.append(Chart(
            "gradient", "Gradient norm at the first step",
            "A tick per run, a dot for the mean." + (" Logarithmic axis." if log else ""),
            strip(canvas, "runs", runs, "first_step_gradient_norm", "gradient norm", log), SECTION,
        ))  # fmt: skip
    layers = views.tables["layers"]
    if len(layers) and layers["relative_norm"].notna().any():
        made.append(Chart(
            "norm", "Size of the start, norm of sBA / norm of W",
            "A tick per layer and seed, a dot for the mean. Zero if B starts at zero.",
            strip(canvas, "layers", layers, "relative_norm", "norm of sBA / norm of W", False),
            SECTION,
        ))  # fmt: skip
    return made


def cost(canvas: Canvas, rows: pd.DataFrame) -> alt.LayerChart:
    """Seconds to initialize (log) against score with its interval."""
    base = (
        canvas.table("rows")
        .transform_filter(f"{SUBSET_CHOSEN} && datum.init_seconds > 0")
        .transform_calculate(**BAR)
        .encode(
            x=alt.X(
                "init_seconds:Q",
                title="seconds to initialize (log)",
                scale=alt.Scale(type="log", nice=False, padding=18),
                axis=alt.Axis(format="~g", values=log_ticks(rows["init_seconds"])),
            ),
            color=canvas.color("symbol"),
            tooltip=[
                *canvas.score_tooltip(),
                *tooltip(("init_seconds:Q", "seconds to initialize", ".3g")),
            ],
        )
    )
    interval = base.mark_rule(strokeWidth=2.5, opacity=0.6).encode(
        y=alt.Y("bottom:Q", title=f"{canvas.metric}, %", scale=alt.Scale(zero=False, padding=10)),
        y2=alt.Y2("top:Q"),
    )
    point = base.mark_point(filled=True, size=110, opacity=1).encode(
        y=alt.Y("score:Q"), shape=canvas.shape()
    )
    return canvas.finish(alt.layer(interval, point), 280, legend=True)


def strip(
    canvas: Canvas, table: str, frame: pd.DataFrame, field: str, title: str, log: bool
) -> alt.LayerChart:
    """A tick per layer or run, a point for the mean."""
    scale = alt.Scale(type="log", nice=False, padding=18) if log else alt.Scale(zero=True)
    axis = alt.Axis(values=log_ticks(frame[field]), format="~g") if log else alt.Axis(tickCount=6)
    chosen = RUN_CHOSEN if "best" in frame else SEED_CHOSEN
    base = (
        canvas.table(table)
        .transform_filter(f"{chosen} && isValid(datum.{field})")
        .encode(y=canvas.rows(), color=canvas.color(None))
    )
    layer = [("layer:N", "layer")] if "layer" in frame else [RATE]
    one = [("seed:N", "seed"), *layer, (f"{field}:Q", title, ".4g"), ("run_id:N", "run")]
    each = base.mark_tick(thickness=2, size=15, opacity=0.45).encode(
        x=alt.X(f"{field}:Q", title=title, scale=scale, axis=axis), tooltip=tooltip(METHOD, *one)
    )
    mean = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=f"mean({field}):Q",
        tooltip=tooltip(METHOD, (f"mean({field}):Q", f"mean {title}", ".4g")),
    )
    return canvas.finish(alt.layer(each, mean), alt.Step(26))
