"""The training of the chosen settings: losses, gradients and the size of the update."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ..canvas import ARM_CHOSEN, METHOD, ON_PAGE, Canvas, Chart, log_ticks, tooltip, wants_log
from ..views import POINTS, Views

SECTION = "Training"
BAND = (
    "Line: mean over seeds. Band: from the lowest to the highest seed. The chosen settings. Of "
    f"more than {POINTS} steps, a point averages those near it."
)


def charts(canvas: Canvas, views: Views) -> list[Chart]:
    """The charts that have data. A curve needs two steps."""
    made = []
    for name, title, words in (
        ("loss", "Training loss", ""),
        ("validation", "Validation loss", ""),
        ("gradients", "Gradient norm", " Before clipping."),
        ("update", "Size of the update", " ‖ΔW‖ / ‖W‖, over all adapted layers together."),
    ):
        frame = views.tables[name]
        if frame["step"].nunique() > (1 if name == "validation" else 0):
            made.append(Chart(
                name, title, BAND + words, curve(canvas, name, frame, title.lower()), SECTION,
            ))  # fmt: skip
    return made


def curve(canvas: Canvas, name: str, frame: pd.DataFrame, title: str) -> alt.LayerChart:
    """Mean over seeds against the step, with a band from the lowest to the highest seed."""
    base = canvas.table(name).transform_filter(ARM_CHOSEN).encode(
        x=alt.X("step:Q", title="training step", axis=alt.Axis(grid=False, tickCount=6)),
        color=canvas.color("stroke"),
        detail=[alt.Detail("arm:N"), alt.Detail("task:N")],
    )  # fmt: skip
    log = wants_log(frame["lowest"])
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    axis = alt.Axis(format="~g", values=log_ticks(frame["mean"])) if log else alt.Axis(tickCount=6)
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
                ("seeds:Q", "seeds"),
            ),
        )
        .add_params(hover)
        .properties(name=f"{name}{ON_PAGE}")
    )
    return canvas.finish(alt.layer(band, line.encode(y=alt.Y("mean:Q")), dots), 280, legend=True)
