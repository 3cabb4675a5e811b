"""A chart as Vega-Lite JSON for the page, and as SVG, PDF and PNG."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from .canvas import GRID, INK, ON_PAGE, SOFT, Canvas, Chart, records

# Version 6.4 writes "undefined" for names in the tooltips of nearest-point selections.
VEGA_LITE = "6.1"
# Slanted labels extend a few pixels further to the right than Vega computes.
PADDING = {"left": 6, "top": 6, "right": 14, "bottom": 6}
FILE_WIDTH = 640
FONT = "Inter, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"


def page_specification(drawing: alt.LayerChart) -> dict:
    """For the page: as wide as its card, without title and data, which the page has."""
    return themed(drawing.properties(width="container"))


def write_pictures(
    chart: Chart, canvas: Canvas, tables: dict[str, pd.DataFrame], output: Path
) -> list[str]:
    """Write the files of a chart and of its choices (`layers`, `layers-update_size`, …).

    Returns:
        The names of the files without an ending.
    """
    title = chart.title + canvas.shown_first(chart)
    cases: dict[str, tuple[str, dict[str, Any]]] = {chart.name: (title, {})}
    if chart.parameter is not None:
        shown = list(chart.choices.items())[: None if chart.all_drawn else 1]
        cases = {
            f"{chart.name}-{value}" if position else chart.name: (
                f"{title}: {label}",
                {chart.parameter: value},
            )
            for position, (value, label) in enumerate(shown)
        }
    for name, (heading, parameters) in cases.items():
        specification = file_specification(chart.drawing, heading, tables, parameters)
        svg = vl_convert.vegalite_to_svg(specification, vl_version=VEGA_LITE)
        (output / f"{name}.svg").write_text(svg, encoding="utf-8")
        (output / f"{name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=2))
        (output / f"{name}.pdf").write_bytes(vl_convert.svg_to_pdf(svg))
    return list(cases)


def file_specification(
    drawing: alt.LayerChart,
    title: str,
    tables: dict[str, pd.DataFrame],
    parameters: dict[str, Any],
) -> dict:
    """For a file: with a fixed width, a title and its data.

    Args:
        tables: by name, the tables that the drawing uses.
        parameters: values instead of the chart's initial ones.
    """
    heading = alt.TitleParams(title, anchor="start", offset=18, fontSize=16)
    # Validation takes half of the time, and the page has validated the same drawing.
    specification = themed(drawing.properties(width=FILE_WIDTH, title=heading), validate=False)
    drop_hidden_layers(specification)
    for parameter in specification.get("params", []):
        if parameter["name"] in parameters:
            parameter["value"] = parameters[parameter["name"]]
    for name in used(specification) & tables.keys():
        specification.setdefault("datasets", {})[name] = records(tables[name])
    return specification


def drop_hidden_layers(specification: dict) -> None:
    """Remove layers that show only under the mouse, and their selections."""
    layers = specification.get("layer", [])
    hidden = {layer["name"] for layer in layers if layer.get("name", "").endswith(ON_PAGE)}
    if hidden:
        shown = [layer for layer in layers if layer.get("name") not in hidden]
        params = [p for p in specification["params"] if not hidden.intersection(p.get("views", []))]
        specification.update(layer=shown, params=params)


def used(specification: Any) -> set[str]:
    """The names of the tables that a specification uses."""
    if isinstance(specification, list):
        return set().union(*map(used, specification)) if specification else set()
    if not isinstance(specification, dict):
        return set()
    data = specification.get("data")
    here = {data["name"]} if isinstance(data, dict) and "values" not in data else set()
    return here.union(*map(used, specification.values()))


def columns(frame: pd.DataFrame) -> dict[str, Any]:
    """A table as JSON by column, with each repeated text once: a fifth of the length of rows."""
    shown: dict[str, Any] = {}
    for name in frame:
        if pd.api.types.is_string_dtype(frame[name]) and frame[name].nunique() < len(frame) / 2:
            codes, texts = pd.factorize(frame[name])
            shown[name] = {"texts": texts.tolist(), "codes": codes.tolist()}
        else:
            shown[name] = json.loads(frame[name].to_json(orient="values", double_precision=10))
    return shown


def themed(drawing: alt.TopLevelMixin, validate: bool = True) -> dict:
    """Any drawing as JSON with the common look of all charts."""
    specification = drawing.to_dict(validate=validate)
    specification.pop("$schema", None)  # a URL, which a page without addresses must not contain
    given = specification.get("config", {})
    specification["config"] = {
        part: {**given[part], **value} if isinstance(given.get(part), dict) else value
        for part, value in (given | look()).items()
    }
    return specification


@cache
def look() -> dict:
    """The configuration of every chart, made once: Altair's `configure` copies the drawing."""
    plain = (
        alt.Chart().mark_point().configure(font=FONT, background="white", padding=PADDING)
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
        .configure_header(labelColor=INK, titleColor=SOFT, labelFontSize=12.5, titleFontSize=12.5)
        .configure_title(color=INK, fontWeight=600)
    )  # fmt: skip
    return plain.to_dict()["config"]
