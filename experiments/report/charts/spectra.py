"""The spectrum of a weight, with the part of each direction that each start uses."""

from __future__ import annotations

import altair as alt

from ..canvas import ARM_CHOSEN, METHOD, Canvas, Chart, tooltip
from ..views import Views
from .layers import SECTION

TALL = 0.84  # height of the tallest bar, as a share of the distance between two rows


def charts(canvas: Canvas, views: Views) -> list[Chart]:
    """The chart, if any chosen run has spectra."""
    frame = views.tables["spectra"]
    if frame.empty:
        return []
    layers = list(dict.fromkeys(frame["layer"]))
    return [Chart(
        "spectra", "The spectrum, and the part that each start uses",
        "Grey: the leading singular values of the weight, relative to the first. Colored: the "
        "share of each direction that lies in the space of the initial adapter. One seed of each "
        "chosen setting.",
        spectra(canvas, layers[0]), SECTION, parameter="layer",
        choices={layer: layer for layer in layers}, all_drawn=False,
    )]  # fmt: skip


def spectra(canvas: Canvas, layer: str) -> alt.LayerChart:
    """A row per arm: bars of height σ_k / σ_1, filled up to the share that the start uses."""
    base = (
        canvas.table("spectra")
        .transform_filter(f"{ARM_CHOSEN} && datum.layer == layer")
        .transform_window(place="dense_rank()", sort=[alt.SortField("order")], frame=[None, None])
        .transform_calculate(
            foot="-datum.place",
            top=f"-datum.place + {TALL} * datum.value",
            filled=f"-datum.place + {TALL} * datum.value * datum.taken",
        )
    )
    x = alt.X("index:Q", title="singular direction", axis=alt.Axis(grid=False, tickCount=6),
              scale=alt.Scale(nice=False, padding=4))  # fmt: skip
    y = alt.Y("foot:Q", axis=None, scale=alt.Scale(nice=False, zero=False))
    value, taken = ("value:Q", "σ / σ₁", ".3f"), ("taken:Q", "share used", ".3f")
    tips = tooltip(METHOD, ("index:Q", "direction"), value, taken)
    whole = base.mark_bar(color="#dfe3e8").encode(x=x, y=y, y2=alt.Y2("top:Q"), tooltip=tips)
    part = base.mark_bar().encode(
        x=x, y=y, y2=alt.Y2("filled:Q"), color=canvas.color(None), tooltip=tips
    )
    names = (
        base.transform_aggregate(last="max(index)", groupby=["arm", "method", "place"])
        .transform_calculate(height=f"-datum.place + {TALL / 2}")
        .mark_text(align="right", fontSize=12, fontWeight=600)
        .encode(
            x=alt.X("last:Q"), y=alt.Y("height:Q"), text=alt.Text("arm:N"), color=canvas.color(None)
        )
    )
    drawing = canvas.finish(alt.layer(whole, part, names), max(160, 46 * canvas.rows_at_first))
    return drawing.add_params(alt.param(name="layer", value=layer))
