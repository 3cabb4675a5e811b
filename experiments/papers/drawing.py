"""Charts of the reproductions: what their Altair code shares, and their files.

The look and the colors of the methods are those of the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from ..report.canvas import INK, SOFT, records
from ..report.palette import MARKS, marks, ordered
from ..report.specification import VEGA_LITE, themed
from ..run.files import write_bytes, write_text
from .reproduction import Figure

__all__ = ["INK", "MARKS", "SOFT", "marks", "ordered"]
# Okabe and Ito's colors, which differ under the common color deficiencies.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
HEADER = alt.Header(labelColor=SOFT, title=None)
LOG = alt.Scale(type="log", nice=False, padding=8)


def chart(frame: pd.DataFrame) -> alt.Chart:
    """A chart that holds its rows, so that the page loads nothing."""
    return alt.Chart(alt.InlineData(values=records(frame)))


def legend(title: str | None = None, **more: Any) -> alt.Legend:
    """A legend below the chart."""
    return alt.Legend(title=title, orient="bottom", **more)


BELOW = legend()


def color(
    field: str, colors: Mapping[str, str] | Sequence[str], shown: alt.Legend | None = BELOW
) -> alt.Color:
    """Fixed colors by value; a plain list of values takes the palette's."""
    if not isinstance(colors, Mapping):
        colors = dict(zip(colors, PALETTE, strict=False))
    scale = alt.Scale(domain=list(colors), range=list(colors.values()))
    return alt.Color(f"{field}:N", scale=scale, legend=shown)


def methods_color(methods: Sequence[str], field: str = "method", legend: bool = True) -> alt.Color:
    """The fixed colors of the initializers."""
    colors = {method: mark.color for method, mark in marks(list(methods)).items()}
    shown = alt.Legend(title=None, orient="bottom", columns=4, symbolOpacity=1) if legend else None
    return color(field, colors, shown)


def plot(
    frame: pd.DataFrame,
    mark: str,
    x: alt.X,
    y: alt.Y,
    *,
    color: Any = PALETTE[0],
    panel: str | None = None,
    dash: str | None = None,
    interval: tuple[str, str] | None = None,
    level: float | None = None,
    text: str | None = None,
    columns: int = 2,
    shared: bool = True,
    width: int = 260,
    height: Any = 220,
    **channels: Any,
) -> alt.Chart | alt.FacetChart:
    """A chart of one kind of mark, with panels and tooltips of all columns.

    Args:
        mark: "line" (with points), "point", "bar", "tick" or "rect" (a heat map).
        color: a channel, or one color.
        panel: a column; one panel for each of its values.
        dash: a column that decides the dashes of lines.
        interval: the columns of an interval along y, or along x if y holds categories.
        level: draw a dashed line at this y, or at this x if y holds categories.
        text: a column of numbers, written with their sign: in each cell of a heat map, or next to
            each mark.
        shared: whether the panels share their scales of numbers; they never share categories.
        channels: more of Altair's channels.
    """
    if isinstance(color, str):
        color = alt.value(color)
    channels = {"x": x, "y": y, "color": color} | channels
    tooltip = [
        alt.Tooltip(f"{name}:Q", format=".3g")
        if pd.api.types.is_float_dtype(frame[name])
        else alt.Tooltip(f"{name}:N")
        for name in frame
    ]
    base = alt.Chart().encode(tooltip=tooltip, **channels)
    along = "y" if str(y.shorthand).endswith(":Q") else "x"
    layers = []
    if level is not None:
        line = alt.Chart().mark_rule(color=SOFT, strokeDash=[4, 3])
        layers.append(line.encode(**{along: alt.datum(level)}))
    if interval is not None:
        low, high = interval
        ends = {along: channels[along].copy(), f"{along}2": f"{high}:Q"}
        ends[along].shorthand = f"{low}:Q"
        layers.append(base.mark_rule(strokeWidth=2).encode(**ends))
    if mark == "line":
        # Points that are a part of the line's mark would take the legend of the dashes.
        strokes = alt.Undefined
        if dash is not None:
            shown = {"symbolSize": 300, "symbolStrokeWidth": 2, "symbolStrokeColor": SOFT}
            of_dashes = legend(dash, symbolType="stroke", **shown)
            strokes = alt.StrokeDash(f"{dash}:N", legend=of_dashes)
        layers.append(base.mark_line(strokeWidth=2).encode(strokeDash=strokes))
        mark = "point"
    style = {
        "point": {"filled": True, "size": 45, "opacity": 0.9},
        "tick": {"thickness": 2},
        "rect": {"stroke": "white"},
    }.get(mark, {})
    layers.append(getattr(base, f"mark_{mark}")(**style))
    if text is not None:
        words = alt.Text(f"{text}:Q", format="+.1f")
        layers.append(base.mark_text(fontSize=10).encode(text=words, color=alt.value(INK)))
    drawn = alt.layer(*layers, data=chart(frame).data).properties(width=width, height=height)
    if panel is None:
        return drawn
    facet = alt.Facet(f"{panel}:N", header=HEADER, sort=list(frame[panel].unique()))
    scales = {
        name: "shared" if shared and str(axis.shorthand).endswith(":Q") else "independent"
        for name, axis in (("x", x), ("y", y))
    }
    return drawn.facet(facet, columns=columns).resolve_scale(**scales)


def page_specification(figure: Figure) -> dict[str, Any]:
    """The Vega-Lite JSON for the page: as wide as its card if the figure has one width."""
    drawing = figure.drawing
    return themed(drawing if figure.width is None else drawing.properties(width="container"))


def file_specification(figure: Figure) -> dict[str, Any]:
    """The Vega-Lite JSON for a file: with its title, at its own width."""
    heading = alt.TitleParams(figure.title, anchor="start", offset=18, fontSize=16)
    drawing = figure.drawing.properties(title=heading)
    return themed(drawing if figure.width is None else drawing.properties(width=figure.width))


def write_pictures(figure: Figure, folder: Path) -> None:
    """Write a figure as SVG, and as PNG at twice the size."""
    svg = vl_convert.vegalite_to_svg(file_specification(figure), vl_version=VEGA_LITE)
    write_text(folder / f"{figure.name}.svg", svg)
    write_bytes(folder / f"{figure.name}.png", vl_convert.svg_to_png(svg, scale=2))
