"""A chart as files for a paper: SVG, PDF and PNG from one specification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import vl_convert

from .canvas import Canvas, Chart
from .specification import VEGA_LITE, file_specification


@dataclass(frozen=True)
class Pictures:
    """The files of one chart, and of each of its choices (`layers`, `layers-update_size`, …)."""

    chart: Chart
    canvas: Canvas
    tables: dict[str, pd.DataFrame]

    def write(self, output: Path) -> list[str]:
        """Write them and return their names without an ending."""
        title = self.chart.title + self.canvas.told(self.chart)
        if not self.chart.choices:
            return [self.one(output, self.chart.name, title, {})]
        names = []
        for position, (value, words) in enumerate(self.chart.choices.items()):
            name = f"{self.chart.name}-{value}" if position else self.chart.name
            if position and not self.chart.all_drawn:
                break
            chosen = {self.chart.parameter: value}
            names.append(self.one(output, name, f"{title}: {words}", chosen))
        return names

    def one(self, output: Path, name: str, title: str, parameters: dict) -> str:
        specification = file_specification(self.chart.drawing, title, self.tables, parameters)
        svg = vl_convert.vegalite_to_svg(specification, vl_version=VEGA_LITE)
        (output / f"{name}.svg").write_text(svg, encoding="utf-8")
        (output / f"{name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=2))
        (output / f"{name}.pdf").write_bytes(vl_convert.svg_to_pdf(svg))
        return name
