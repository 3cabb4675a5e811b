"""The start of each layer and its change by training: one map of many quantities."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ..canvas import ARM_CHOSEN, METHOD, Canvas, Chart, tooltip
from ..views import Views

SECTION = "Layers"
QUANTITIES = {
    "captured_energy": "captured energy",
    "layer_rank": "rank",
    "relative_norm": "size of the start, ‖sBA‖ / ‖W‖",
    "update_size": "size of the update, ‖ΔW‖ / ‖W‖",
    "intruder_dimensions": "intruder dimensions",
    "angle_A": "angle between the initial and the final A, degrees",
    "angle_B": "angle between the initial and the final B, degrees",
}


def charts(canvas: Canvas, views: Views) -> list[Chart]:
    """The map, if any layer has one of the quantities."""
    frame = views.tables["layers"]
    known = {
        name: words for name, words in QUANTITIES.items()
        if frame[name].nunique() > (1 if name == "layer_rank" else 0)
    }  # fmt: skip
    if not known:
        return []
    return [Chart(
        "layers", "Layer by layer",
        "Mean over seeds at the chosen settings. Grey: not defined for the method. Captured "
        "energy: ‖W P‖² / ‖W‖², with P the projection on the rows of the initial A. Intruder "
        "dimensions: leading singular vectors of the trained weight unlike those of W. Angle: "
        "mean principal angle between two subspaces.",
        heat_map(canvas, frame, next(iter(known))), SECTION, parameter="quantity", choices=known,
    )]  # fmt: skip


def heat_map(canvas: Canvas, layers: pd.DataFrame, quantity: str) -> alt.LayerChart:
    """Layers by arms: the mean over seeds of the chosen quantity; grey if there is none."""
    order = layers["layer"].drop_duplicates().tolist()
    tall = max(200, min(15 * len(order), 900))
    base = (
        canvas.table("layers")
        .transform_filter(ARM_CHOSEN)
        .transform_calculate(value="datum[quantity]")
        .encode(
            x=alt.X(
                "arm:N", sort=canvas.arms, title=None,
                axis=alt.Axis(orient="top", labelAngle=alt.ExprRef("slant"),
                              labelAlign="left", labelBaseline="middle", labelPadding=8,
                              ticks=False, domain=False, labelLimit=150, labelOverlap=False),
            ),
            y=alt.Y(
                "layer:N", sort=order, title=None,
                axis=alt.Axis(ticks=False, domain=False, labelFontSize=10.5, labelPadding=6,
                              labelLimit=alt.ExprRef("width < 300 ? 110 : 170"),
                              labelOverlap=True),
            ),
            tooltip=tooltip(
                METHOD,
                ("layer:N", "layer"),
                ("shape:N", "weight (out × in)"),
                ("layer_rank:Q", "rank", ".4g"),
                ("value:Q", "chosen quantity", ".4g"),
                ("relative_norm:Q", "‖sBA‖ / ‖W‖", ".4g"),
                ("error:Q", "error", ".4g"),
            ),
        )
    )  # fmt: skip
    color = alt.Color(
        "value:Q",
        title=None,
        scale=alt.Scale(scheme="viridis", reverse=True, zero=True),
        legend=alt.Legend(
            orient="bottom", direction="horizontal", gradientLength=200, format="~g",
            gradientThickness=10,
        ),
    )  # fmt: skip
    known = (
        base.transform_filter("isValid(datum.value)")
        .mark_rect(stroke="white", strokeWidth=0.7)
        .encode(color=color)
    )
    unknown = base.transform_filter("!isValid(datum.value)").mark_rect(
        color="#eef0f3", stroke="white", strokeWidth=0.7
    )
    drawing = canvas.finish(alt.layer(unknown, known), tall)
    # The page sets `slant` before it draws, like `legend_columns`.
    return drawing.add_params(
        alt.param(name="quantity", value=quantity), alt.param(name="slant", value=-40)
    )
