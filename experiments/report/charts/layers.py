"""What each start did to each layer, and where training has taken it: one map, many quantities."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ..canvas import FEW_TICKS, SEED_CHOSEN, Canvas, Chart
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
    """Those that there are data for."""
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
            "Mean over seeds at the chosen settings; grey: not defined for the method. Captured "
            "energy: ‖W P‖² / ‖W‖², P the projection on the rows of the initial A. Intruder "
            "dimensions: leading singular vectors of the trained weight unlike any of W.",
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
    """Layer by arm: mean over seeds of the quantity that is chosen; grey where there is none."""
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
            tooltip=[
                alt.Tooltip("arm:N", title="method"),
                alt.Tooltip("layer:N"),
                alt.Tooltip("shape:N", title="weight (out × in)"),
                alt.Tooltip("rank:Q", format=".4g"),
                alt.Tooltip("value:Q", title="chosen quantity", format=".4g"),
                alt.Tooltip("relative_norm:Q", title="‖sBA‖ / ‖W‖", format=".4g"),
                alt.Tooltip("error:Q", title="error", format=".4g"),
            ],
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
    # The page sets `slant` before it draws, as it does `legend_columns`.
    return drawing.add_params(
        alt.param(name="quantity", value=quantity), alt.param(name="slant", value=-40)
    )


def rotation(canvas: Canvas) -> alt.LayerChart:
    """Angles of A above, of B below, in each arm's row."""
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
    each = base.mark_tick(thickness=1.6, size=12, opacity=0.4).encode(
        x=x,
        tooltip=[
            alt.Tooltip("arm:N", title="method"),
            alt.Tooltip("factor:N"),
            alt.Tooltip("layer:N"),
            alt.Tooltip("seed:N"),
            alt.Tooltip("angle:Q", format=".4g"),
        ],
    )
    means = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=alt.X("mean(angle):Q"),
        tooltip=[
            alt.Tooltip("arm:N", title="method"),
            alt.Tooltip("factor:N"),
            alt.Tooltip("mean(angle):Q", title="mean angle", format=".4g"),
        ],
    )
    names = base.mark_text(align="left", dx=7, fontSize=10).encode(
        x=alt.X("max(angle):Q"), text=alt.Text("factor:N")
    )
    return canvas.finish(alt.layer(each, means, names), alt.Step(**{"step": 36, "for": "position"}))
