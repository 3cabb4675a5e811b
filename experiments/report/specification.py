"""A chart as Vega-Lite JSON: one definition, for the page and for the files."""

from __future__ import annotations

import altair as alt

from .canvas import GRID, INK, SOFT

# Version 6.4 writes "undefined" for names in the tooltips of nearest-point selections.
VEGA_LITE = "6.1"
FONT = "Inter, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"


def page_specification(drawing: alt.LayerChart) -> dict:
    """For the page: as wide as its card; the heading is the card's."""
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    return _specification(drawing.properties(width="container", autosize=fit))


def file_specification(drawing: alt.LayerChart, title: str, width: int = 640) -> dict:
    """For a file: a fixed width, its title above it."""
    heading = alt.TitleParams(title, anchor="start", offset=18, fontSize=16)
    return _specification(drawing.properties(width=width, title=heading))


def _specification(drawing: alt.LayerChart) -> dict:
    drawing = (
        drawing.configure(font=FONT, background="white", padding=6)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=INK, titleColor=SOFT, gridColor=GRID, domainColor="#b9c0c8",
            tickColor="#b9c0c8", labelFontSize=12, titleFontSize=12.5, titleFontWeight="normal",
            titlePadding=9,
        )
        .configure_legend(
            labelFontSize=12, labelColor=INK, titleColor=SOFT, titleFontWeight="normal",
            titleFontSize=12, symbolSize=110, columnPadding=14, unselectedOpacity=0.3,
        )
        .configure_title(color=INK, fontWeight=600)
    )  # fmt: skip
    specification = drawing.to_dict()
    specification.pop("$schema", None)  # an address, although nothing loads it
    return specification
