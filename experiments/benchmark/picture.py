"""The picture: the time of each initialization, a panel for each model and rank."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from .row import LINALG, OURS, PEFT, Row

INK, SOFT, GRID = "#24292f", "#57606a", "#e7eaee"
SHAPES = {OURS: "circle", PEFT: "diamond", LINALG: "square"}
COLORS = {OURS: "#0072b2", PEFT: "#d55e00", LINALG: "#57606a"}
FONT = "Inter, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
PANEL_WIDTH, ROW_HEIGHT, PANELS = 330, 19, 2
SECONDS = (
    "datum.value >= 1 ? format(datum.value, '~g') + ' s' : format(1e3 * datum.value, '~g') + ' ms'"
)


def picture_of(rows: Sequence[Row]) -> alt.VConcatChart | None:
    """Return the picture, or None where no initialization was timed."""
    marks = pd.DataFrame(
        {
            "panel": row.model + f", rank {row.rank}",
            "method": row.case,
            "library": library,
            "seconds": seconds,
        }
        for row in rows
        if row.section == "initialization"
        for library, seconds in ((OURS, row.ours), (PEFT, row.peft), (LINALG, row.linalg))
        if seconds is not None and seconds > 0
    )
    if marks.empty:
        return None
    panels = [panel(part, name) for name, part in marks.groupby("panel", sort=False)]
    lines = [
        alt.hconcat(*panels[first : first + PANELS], spacing=28)
        for first in range(0, len(panels), PANELS)
    ]
    title = alt.TitleParams(
        "The time of each initialization", anchor="start", offset=18, fontSize=16,
        subtitle="Medians on a logarithmic axis; all libraries adapt the same layers.",
        subtitleFontSize=12, subtitleColor=SOFT,
    )  # fmt: skip
    return (
        alt.vconcat(*lines, spacing=28, title=title)
        .configure(font=FONT, background="white")
        .configure_axis(gridColor=GRID, labelColor=INK, domainColor=GRID, tickColor=GRID)
        .configure_view(stroke=None)
    )


def panel(marks: pd.DataFrame, name: str) -> alt.LayerChart:
    """Draw one model: a symbol for each library, joined by a line for each method."""
    libraries = list(SHAPES)
    scale = alt.Scale(type="log", nice=False, padding=12)
    y = alt.Y(
        "method:N", sort=list(dict.fromkeys(marks["method"])), title=None,
        axis=alt.Axis(ticks=False, domain=False, grid=True, labelPadding=8),
    )  # fmt: skip
    axis = alt.Axis(labelExpr=SECONDS, labelOverlap=True, values=ticks(marks["seconds"]))
    legend = alt.Legend(title=None, orient="bottom", direction="horizontal")
    base = alt.Chart(marks)
    joined = base.mark_rule(color="#d0d7de", strokeWidth=2).encode(
        x=alt.X("min(seconds):Q", scale=scale), x2="max(seconds):Q", y=y
    )
    symbols = base.mark_point(size=65, opacity=1, filled=True).encode(
        x=alt.X("seconds:Q", title=None, scale=scale, axis=axis),
        y=y,
        shape=alt.Shape(
            "library:N", legend=legend,
            scale=alt.Scale(domain=libraries, range=list(SHAPES.values())),
        ),
        color=alt.Color(
            "library:N", legend=legend,
            scale=alt.Scale(domain=libraries, range=list(COLORS.values())),
        ),
        tooltip=["method", "library", alt.Tooltip("seconds", format=".4~g")],
    )  # fmt: skip
    return alt.layer(joined, symbols).properties(
        width=PANEL_WIDTH,
        height=ROW_HEIGHT * marks["method"].nunique(),
        title=alt.TitleParams(name, anchor="start", fontSize=13),
    )


def ticks(seconds: pd.Series) -> list[float]:
    """Return the values 1 and 3 times a power of ten within the range of the axis."""
    steps = [step * 10.0**power for power in range(-5, 5) for step in (1, 3)]
    return [step for step in steps if 0.8 * seconds.min() <= step <= 1.2 * seconds.max()]
