"""A chart as files for a paper: SVG, PDF and PNG from one specification."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import vl_convert

from .canvas import Canvas, Chart
from .specification import VEGA_LITE, file_specification


def write_pictures(
    chart: Chart, canvas: Canvas, tables: dict[str, pd.DataFrame], output: Path
) -> list[str]:
    """Write the files of a chart and of its choices (`layers`, `layers-update_size`, …).

    Returns:
        The names of the files without an ending.
    """
    title = chart.title + canvas.shown_first(chart)
    cases = {chart.name: (title, {})}
    if chart.choices:
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
