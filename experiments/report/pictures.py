"""A chart as files for a paper: SVG, PDF and PNG from one specification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import vl_convert

from .canvas import Chart
from .specification import VEGA_LITE, file_specification


@dataclass(frozen=True)
class Pictures:
    """The files of one chart, and of each of its choices (`layers`, `layers-update_size`, …)."""

    chart: Chart
    tables: dict[str, pd.DataFrame]

    def write(self, output: Path) -> list[str]:
        """Write them and return their names without an ending."""
        if not self.chart.choices:
            return [self.one(output, self.chart.name, self.chart.title, {})]
        names = []
        for position, (value, words) in enumerate(self.chart.choices.items()):
            name = f"{self.chart.name}-{value}" if position else self.chart.name
            title = f"{self.chart.title}: {words}"
            if position and not self.chart.all_drawn:
                break
            names.append(self.one(output, name, title, {self.chart.parameter: value}))
        return names

    def one(self, output: Path, name: str, title: str, parameters: dict) -> str:
        specification = file_specification(self.chart.drawing, title, self.tables, parameters)
        svg = vl_convert.vegalite_to_svg(specification, vl_version=VEGA_LITE)
        (output / f"{name}.svg").write_text(svg, encoding="utf-8")
        (output / f"{name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=2))
        (output / f"{name}.pdf").write_bytes(vl_convert.svg_to_pdf(svg))
        return name
