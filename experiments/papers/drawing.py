"""Charts of the reproductions: one definition, for the page and for files.

The look is the report's (`experiments.report.specification`), and so are the methods' colours:
`methods_color(methods)` for whatever is drawn by initializer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from experiments.papers.findings import Figure
from experiments.report.canvas import inline
from experiments.report.palette import marks
from experiments.report.specification import VEGA_LITE, themed
from experiments.run.files import write_bytes, write_text


def chart(frame: pd.DataFrame) -> alt.Chart:
    """A chart with its rows inside, as a page that loads nothing needs them."""
    return alt.Chart(inline(frame))


def methods_color(methods: Sequence[str], field: str = "method", legend: bool = True) -> alt.Color:
    """The fixed colours of initializers."""
    chosen = marks(list(methods))
    scale = alt.Scale(domain=list(methods), range=[chosen[m].color for m in methods])
    drawn = alt.Legend(title=None, orient="bottom", columns=4, symbolOpacity=1) if legend else None
    return alt.Color(f"{field}:N", scale=scale, legend=drawn)


def page_specification(figure: Figure) -> dict[str, Any]:
    """As wide as its card, where the drawing can be stretched."""
    drawing = figure.drawing
    return themed(drawing if figure.width is None else drawing.properties(width="container"))


def file_specification(figure: Figure) -> dict[str, Any]:
    """With its title above it, at its own width."""
    heading = alt.TitleParams(figure.title, anchor="start", offset=18, fontSize=16)
    drawing = figure.drawing.properties(title=heading)
    return themed(drawing if figure.width is None else drawing.properties(width=figure.width))


def write_pictures(figure: Figure, folder: Path) -> None:
    """SVG, and PNG at twice the size."""
    svg = vl_convert.vegalite_to_svg(file_specification(figure), vl_version=VEGA_LITE)
    write_text(folder / f"{figure.name}.svg", svg)
    write_bytes(folder / f"{figure.name}.png", vl_convert.svg_to_png(svg, scale=2))
