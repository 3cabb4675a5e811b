"""Every quantity of every arm compared with the baseline's: differences and factors."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ..canvas import ARM_CHOSEN, FEW_TICKS, INK, METHOD, SOFT, Canvas, Chart, interval_of, tooltip
from ..palette import BASELINE
from ..quantities import QUANTITIES
from ..views import Views

SECTION = "Against the baseline"
HOLLOW = "datum.verdict == 'not resolved' || datum.verdict == 'tie'"


def charts(canvas: Canvas, views: Views) -> list[Chart]:
    """The charts that have data."""
    frame = views.tables["verdicts"]
    if frame.empty:
        return []
    made = []
    caption = (
        "Paired over all seeds, with 95 % intervals. Hollow: a "
        "tie, or not resolved, as the label says."
    )
    for name, part, title, values in (
        ("difference", frame[~frame["factor"]], f"Difference to {BASELINE}", "differences"),
        ("factors", frame[frame["factor"]], f"Times {BASELINE}’s", "factors"),
    ):
        if len(part):
            present = set(part["quantity"])
            choices = {
                q.name: canvas.quantity_label(q)
                for q in QUANTITIES if q.name in present
            }  # fmt: skip
            made.append(Chart(
                name, title, caption + (" Logarithmic axis." if name == "factors" else ""),
                drawing(canvas, part, next(iter(choices)), values == "factors"), SECTION,
                parameter="quantity", choices=choices,
            ))  # fmt: skip
    return made


def drawing(canvas: Canvas, frame: pd.DataFrame, first: str, factor: bool) -> alt.LayerChart:
    """A row per arm: the difference or factor of the chosen quantity with its interval."""
    form = ".3~g" if factor else "+.1f"
    sign = "'×' + " if factor else ""
    base = (
        canvas.table("verdicts")
        .transform_filter(
            f"{ARM_CHOSEN} && datum.quantity == quantity && datum.factor == {str(factor).lower()}"
        )
        .transform_calculate(
            label="datum.verdict == 'tie' || datum.verdict == 'not resolved' ? datum.verdict : "
            f"{sign}format(datum.value, '{form}')",
            bottom="isValid(datum.low) ? datum.low : datum.value",
            top="isValid(datum.high) ? datum.high : datum.value",
        )
        .encode(y=canvas.rows(without_baseline=True), color=canvas.color(None))
    )
    ends = interval_of("low", "high", form)
    value = ("value:Q", f"times {BASELINE}’s" if factor else f"difference to {BASELINE}", form)
    tips = tooltip(METHOD, value, *ends, ("verdict:N", "verdict"))
    if factor:
        axis = alt.Axis(tickCount=FEW_TICKS, format="~g")
        scale, none = alt.Scale(type="log", nice=False, padding=24), 1
        title = f"times {BASELINE}’s (log)"
    else:
        label = "datum.value === 0 ? '0' : format(datum.value, '+.4~g')"
        axis = alt.Axis(tickCount=FEW_TICKS, labelExpr=label)
        scale, none = alt.Scale(padding=10), 0
        title = f"difference to {BASELINE}"
    x = alt.X("bottom:Q", title=title, scale=scale, axis=axis)
    interval = canvas.bars(base, x, "top", tips)
    point = base.mark_point(size=95, opacity=1, strokeWidth=2).encode(
        x=alt.X("value:Q"),
        fill=alt.condition(HOLLOW, alt.value("white"), canvas.color(None)),
        tooltip=tips,
    )
    text = base.mark_text(dy=-13, fontSize=12).encode(
        x=alt.X("value:Q"), text=alt.Text("label:N"), color=alt.value(SOFT)
    )
    line = alt.Chart(alt.InlineData(values=[{"none": none}]))
    line = line.mark_rule(color=INK, strokeWidth=1).encode(x=alt.X("none:Q"))
    made = canvas.finish(alt.layer(line, interval, point, text), alt.Step(38))
    return made.add_params(alt.param(name="quantity", value=first))
