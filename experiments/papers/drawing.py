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

from ..report.canvas import INK, SOFT, inline
from ..report.palette import MARKS, marks, ordered
from ..report.specification import VEGA_LITE, themed
from ..run.files import write_bytes, write_text
from .reproduction import Figure

__all__ = ["INK", "MARKS", "SOFT", "marks", "ordered"]
# Okabe and Ito's colors, which differ under the common color deficiencies.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
HEADER = alt.Header(labelColor=SOFT, title=None)
LOG = alt.Scale(type="log")


def chart(frame: pd.DataFrame) -> alt.Chart:
    """A chart that holds its rows, so that the page loads nothing."""
    return alt.Chart(inline(frame))


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


def tips(*fields: str, **formats: str) -> list[alt.Tooltip]:
    """Tooltips: fields with their types, then numbers with their formats."""
    numbers = [alt.Tooltip(f"{name}:Q", format=form) for name, form in formats.items()]
    return [*map(alt.Tooltip, fields), *numbers]


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
