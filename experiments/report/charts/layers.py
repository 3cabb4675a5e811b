"""The start of each layer and its change by training: one map of many quantities."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ..canvas import FEW_TICKS, METHOD, SEED_CHOSEN, Canvas, Chart, tooltip
from ..views import Views

SECTION = "Layers"
QUANTITIES = {
    "captured_energy": "captured energy",
    "layer_rank": "rank",
    "relative_norm": "size of the start, ‖sBA‖ / ‖W‖",
    "update_size": "size of the update, ‖ΔW‖ / ‖W‖",
    "intruder_dimensions": "intruder dimensions",
}


def charts(canvas: Canvas, views: Views) -> list[Chart]:
    """The charts that have data."""
    frame = views.tables["layers"]
    if frame.empty:
        return []
    known = {
        name: words for name, words in QUANTITIES.items()
        if frame[name].nunique() > (1 if name == "layer_rank" else 0)
    }  # fmt: skip
    made = []
    if known:
        made.append(Chart(
            "layers", "Layer by layer",
            "Mean over seeds at the chosen settings. Grey: not defined for the method. Captured "
            "energy: ‖W P‖² / ‖W‖², with P the projection on the rows of the initial A. Intruder "
            "dimensions: leading singular vectors of the trained weight unlike those of W.",
            heat_map(canvas, frame, next(iter(known))), SECTION, parameter="quantity",
            choices=known,
        ))  # fmt: skip
    if frame[["angle_A", "angle_B"]].notna().any(axis=None):
        made.append(Chart(
            "rotation", "How far the subspaces turned",
            "Mean principal angle between the initial and the final subspace of A (upper row of "
            "each method) and of B (lower): a tick per layer and seed, a dot for the mean.",
            rotation(canvas), SECTION,
        ))  # fmt: skip
    return made


def heat_map(canvas: Canvas, layers: pd.DataFrame, quantity: str) -> alt.LayerChart:
    """Layers by arms: the mean over seeds of the chosen quantity; grey if there is none."""
    order = layers["layer"].drop_duplicates().tolist()
    tall = max(200, min(15 * len(order), 900))
    base = (
        canvas.table("layers")
        .transform_filter(SEED_CHOSEN)
        .transform_calculate(chosen="datum[quantity]")
        .transform_aggregate(
            value="mean(chosen)", relative_norm="mean(relative_norm)", rank="mean(layer_rank)",
            error="mean(error)", known="valid(chosen)",
            groupby=["arm", "method", "layer", "shape"],
        )
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
                ("rank:Q", "rank", ".4g"),
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
        base.transform_filter("datum.known > 0")
        .mark_rect(stroke="white", strokeWidth=0.7)
        .encode(color=color)
    )
    unknown = base.transform_filter("datum.known == 0").mark_rect(
        color="#eef0f3", stroke="white", strokeWidth=0.7
    )
    drawing = canvas.finish(alt.layer(unknown, known), tall)
    # The page sets `slant` before it draws, like `legend_columns`.
    return drawing.add_params(
        alt.param(name="quantity", value=quantity), alt.param(name="slant", value=-40)
    )


def rotation(canvas: Canvas) -> alt.LayerChart:
    """Angles of A and, below them, of B in each arm's row."""
    base = (
        canvas.table("layers")
        .transform_filter(SEED_CHOSEN)
        .transform_fold(["angle_A", "angle_B"], as_=["factor", "angle"])
        .transform_calculate(factor="slice(datum.factor, -1)")
        .transform_filter("isValid(datum.angle)")
        .encode(y=canvas.rows(), yOffset=alt.YOffset("factor:N"), color=canvas.color(None))
    )
    x = alt.X(
        "angle:Q", title="mean principal angle, degrees", scale=alt.Scale(zero=True),
        axis=alt.Axis(tickCount=FEW_TICKS),
    )  # fmt: skip
    factor, mean = ("factor:N", "factor"), ("mean(angle):Q", "mean angle", ".4g")
    one = (("layer:N", "layer"), ("seed:N", "seed"), ("angle:Q", "angle", ".4g"))
    each = base.mark_tick(thickness=1.6, size=12, opacity=0.4).encode(
        x=x, tooltip=tooltip(METHOD, factor, *one)
    )
    means = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=alt.X("mean(angle):Q"), tooltip=tooltip(METHOD, factor, mean)
    )
    names = base.mark_text(align="left", dx=7, fontSize=10).encode(
        x=alt.X("max(angle):Q"), text=alt.Text("factor:N")
    )
    return canvas.finish(alt.layer(each, means, names), alt.Step(**{"step": 36, "for": "position"}))
