"""What more seeds would resolve: the half-width of an interval against the number of seeds."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ..canvas import INK, SOFT, Canvas, Chart, tooltip
from ..quantities import QUANTITIES
from ..views import Views
from .verdicts import SECTION


def charts(canvas: Canvas, views: Views) -> list[Chart]:
    """The chart, if any quantity has a variance between seeds."""
    frame = views.tables["power"]
    if frame.empty or not frame["half_width"].notna().any():
        return []
    present = set(frame["quantity"])
    choices = {
        q.name: canvas.quantity_label(q) + (", % of the baseline" if q.ratio else "")
        for q in QUANTITIES if q.name in present
    }  # fmt: skip
    return [Chart(
        "power", "What more seeds would resolve",
        "Solid: half of the 95 % interval of a difference. Dashed: the smallest difference that "
        "four of five such sweeps would call, after the strictest step of Holm’s correction. The "
        "number of held-out examples stays as it is. Marked: this sweep. The filters of methods "
        "and ranks do not apply.",
        drawing(canvas, frame, next(iter(choices))), SECTION, parameter="quantity",
        choices=choices,
    )]  # fmt: skip


def drawing(canvas: Canvas, frame: pd.DataFrame, first: str) -> alt.LayerChart:
    """Two curves over the number of seeds, and a mark at the present one."""
    base = canvas.table("power").transform_filter(
        "indexof(tasks, datum.task) >= 0 && datum.quantity == quantity"
    )
    last = int(frame["seeds"].max())
    x = alt.X("seeds:Q", title="seeds", scale=alt.Scale(type="log", base=2, nice=False, padding=8),
              axis=alt.Axis(values=[n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if n <= last],
                            grid=False, format="d"))  # fmt: skip
    y = alt.Y("half_width:Q", title="half-width", scale=alt.Scale(zero=True))
    tips = tooltip(
        ("task:N", "task"), ("seeds:Q", "seeds"), ("half_width:Q", "half-width", ".3g"),
        ("least:Q", "smallest difference resolved", ".3g"),
    )  # fmt: skip
    line = base.mark_line(color=INK, strokeWidth=2).encode(x=x, y=y, detail="task:N")
    dashed = base.mark_line(color=SOFT, strokeWidth=1.6, strokeDash=[5, 4]).encode(
        x=x, y=alt.Y("least:Q"), detail="task:N"
    )
    here = base.transform_filter("datum.present")
    mark = here.mark_point(filled=True, size=110, color="#d55e00", opacity=1).encode(
        x=x, y=y, tooltip=tips
    )
    text = here.mark_text(dx=10, dy=-12, align="left", color="#d55e00", fontSize=12).encode(
        x=x, y=y, text=alt.value("this sweep")
    )
    dots = base.mark_point(filled=True, size=26, color=INK, opacity=0.9).encode(
        x=x, y=y, tooltip=tips
    )
    made = canvas.finish(alt.layer(line, dashed, dots, mark, text), 280)
    return made.add_params(alt.param(name="quantity", value=first))
