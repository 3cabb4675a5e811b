"""Learning against forgetting: a front per method over its learning rates, or a point."""

from __future__ import annotations

import altair as alt

from ..canvas import ARM_CHOSEN, METHOD, RATE, Canvas, Chart, tooltip
from ..views import Views
from .verdicts import SECTION


def charts(canvas: Canvas, views: Views) -> list[Chart]:
    """The chart, if any run has both figures."""
    frame = views.tables["fronts"]
    if frame.empty:
        return []
    kind = f" ({views.forgetting})" if views.forgetting else ""
    several = frame.groupby("arm")["learning_rate"].nunique().max() > 1
    line = "Line: the front of a method over its learning rates. " if several else ""
    return [Chart(
        "forgetting", "Learning against forgetting",
        f"{line}Ring: no other point of any method at this rank learns more and forgets less. "
        f"Means over all seeds. Forgetting is measured against the original base{kind}.",
        drawing(canvas, views, several), SECTION, wide=several,
    )]  # fmt: skip


def drawing(canvas: Canvas, views: Views, several: bool) -> alt.LayerChart:
    """Forgetting to the right, learning upwards; better is up and to the left."""
    kind = "validation " if views.curve == "validation_score" else ""
    metric = f"{kind}{canvas.metric.removeprefix('validation ')}, %"
    largest = views.tables["fronts"]["forgetting"].max()
    base = canvas.table("fronts").transform_filter(ARM_CHOSEN)
    x = alt.X("forgetting:Q", title="forgetting (less is better)",
              scale=alt.Scale(zero=False, padding=14),
              axis=alt.Axis(tickCount=5, format="~e" if largest < 1e-3 else "~g"))  # fmt: skip
    y = alt.Y("learned:Q", title=metric, scale=alt.Scale(zero=False, padding=12))
    tips = tooltip(
        METHOD, RATE, ("learned:Q", metric, ".2f"), ("forgetting:Q", "forgetting", ".4g"),
        ("seeds:Q", "seeds"), ("leads:N", "not dominated"),
    )  # fmt: skip
    color, shape = canvas.color("symbol"), canvas.shape()
    small = base.mark_point(filled=True, size=45 if several else 110, opacity=0.6).encode(
        x=x, y=y, color=color, shape=shape, tooltip=tips
    )
    # Transparent instead of filtered: an axis needs values, also if no point shown leads.
    ring = base.mark_point(size=230, strokeWidth=2.2, shape="circle").encode(
        x=x, y=y, color=color, tooltip=tips,
        opacity=alt.condition("datum.leads", alt.value(1), alt.value(0)),
    )  # fmt: skip
    layers = [small, ring]
    if several:
        line = base.transform_filter("datum.on_front").mark_line(strokeWidth=1.8, opacity=0.8)
        layers.insert(0, line.encode(
            x=x, y=y, color=color, detail=[alt.Detail("arm:N"), alt.Detail("task:N")],
            order=alt.Order("forgetting:Q"),
        ))  # fmt: skip
    return canvas.finish(alt.layer(*layers), 340 if several else 280, legend=True)
