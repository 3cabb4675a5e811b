"""The training of the chosen settings: losses, gradients and the size of the update."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ..canvas import METHOD, ON_PAGE, SEED_CHOSEN, Canvas, Chart, log_ticks, tooltip, wants_log
from ..views import Views

SECTION = "Training"
BAND = "Line: mean over seeds. Band: from the lowest to the highest seed"


def charts(canvas: Canvas, views: Views) -> list[Chart]:
    """The charts that have data."""
    window = views.smoothing
    smooth = f", each run’s values averaged over {window} logged steps" if window > 1 else ""
    made = []
    for name, table, value, title, words in (
        ("loss", "training", "loss", "Training loss", smooth),
        ("validation", "validation", "loss", "Validation loss", ""),
        ("gradients", "training", "grad_norm", "Gradient norm", smooth + ". Before clipping"),
        ("update", "updates", "update_size", "Size of the update",
         ". ‖ΔW‖ / ‖W‖, over all adapted layers together"),
    ):  # fmt: skip
        frame = views.tables[table]
        if len(frame) and frame[value].notna().any():
            made.append(Chart(
                name, title, f"{BAND}{words}. The chosen settings.",
                curve(canvas, table, frame, value, title.lower(), name), SECTION,
            ))  # fmt: skip
    return made


def curve(
    canvas: Canvas, table: str, frame: pd.DataFrame, value: str, title: str, name: str
) -> alt.LayerChart:
    """Mean over seeds against the step, with a band from the lowest to the highest seed."""
    base = (
        canvas.table(table)
        .transform_filter(f"{SEED_CHOSEN} && isValid(datum.{value})")
        .transform_aggregate(
            mean=f"mean({value})", lowest=f"min({value})", highest=f"max({value})", runs="count()",
            groupby=["arm", "method", "task", "step"],
        )
        .encode(
            x=alt.X("step:Q", title="training step", axis=alt.Axis(grid=False, tickCount=6)),
            color=canvas.color("stroke"),
            detail=[alt.Detail("arm:N"), alt.Detail("task:N")],
        )
    )  # fmt: skip
    log = wants_log(frame[value])
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    axis = alt.Axis(format="~g", values=log_ticks(frame[value])) if log else alt.Axis(tickCount=6)
    y = alt.Y("lowest:Q", title=f"{title}{' (log)' if log else ''}", scale=scale, axis=axis)
    band = base.mark_area(opacity=0.14).encode(y=y, y2=alt.Y2("highest:Q"))
    few = frame["step"].nunique() <= 12
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=45) if few else False)
    hover = alt.selection_point(
        name=f"{name}_hover", nearest=True, on="pointerover", clear="pointerout",
        fields=["arm", "step"], empty=False,
    )  # fmt: skip
    dots = (
        base.mark_point(filled=True, size=60)
        .encode(
            y=alt.Y("mean:Q"),
            opacity=alt.condition(hover, alt.value(1), alt.value(0)),
            tooltip=tooltip(
                METHOD,
                ("step:Q", "step"),
                ("mean:Q", f"{title}, mean over seeds", ".4g"),
                ("lowest:Q", "lowest seed", ".4g"),
                ("highest:Q", "highest seed", ".4g"),
                ("runs:Q", "seeds"),
            ),
        )
        .add_params(hover)
        .properties(name=f"{name}{ON_PAGE}")
    )
    return canvas.finish(alt.layer(band, line.encode(y=alt.Y("mean:Q")), dots), 280, legend=True)
