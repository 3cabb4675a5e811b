"""What all charts of one report share: rows, colours, filters, tooltips, round ticks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import altair as alt
import pandas as pd

from .palette import Mark
from .summary import BASELINE

CHOSEN = "indexof(methods, datum.method) >= 0"
RUN_CHOSEN = f"{CHOSEN} && indexof(seeds, datum.seed) >= 0"
SUBSET_CHOSEN = f"{CHOSEN} && datum.seeds == join(seeds, ',')"
INK, SOFT, GRID = "#24292f", "#57606a", "#e7eaee"
FEW_TICKS = alt.ExprRef("width < 320 ? 4 : 7")


@dataclass(frozen=True)
class Canvas:
    """The arms in order, the methods' marks, the filters' values and the score's name."""

    arms: list[str]
    marks: dict[str, Mark]
    seeds: list[int]
    metric: str

    def rows(self, without_baseline: bool = False) -> alt.Y:
        """A row per arm, in the report's order."""
        arms = [a for a in self.arms if not (without_baseline and a.split(" · ")[0] == BASELINE)]
        axis = alt.Axis(ticks=False, domain=False, grid=True, labelPadding=10, labelLimit=220)
        return alt.Y("arm:N", sort=arms, title=None, axis=axis)

    def color(self, legend: str | None) -> alt.Color:
        """The methods' fixed colours; `legend` is its symbol, "stroke" or "symbol", or None."""
        scale = alt.Scale(domain=list(self.marks), range=[m.color for m in self.marks.values()])
        drawn = None if legend is None else self.legend(legend)
        return alt.Color("method:N", scale=scale, legend=drawn)

    def shape(self) -> alt.Shape:
        scale = alt.Scale(domain=list(self.marks), range=[m.shape for m in self.marks.values()])
        return alt.Shape("method:N", scale=scale, legend=self.legend("symbol"))

    def legend(self, kind: str) -> alt.Legend:
        stroke = {"symbolType": "stroke", "symbolStrokeWidth": 3} if kind == "stroke" else {}
        columns = alt.ExprRef("width < 250 ? 2 : width < 400 ? 3 : 4")
        return alt.Legend(
            title=None, orient="bottom", columns=columns, symbolOpacity=1, offset=14, **stroke
        )

    def score_tooltip(self) -> list[alt.Tooltip]:
        return [
            alt.Tooltip("arm:N", title="method"),
            alt.Tooltip("score:Q", title=f"{self.metric}, %", format=".2f"),
            alt.Tooltip("low:Q", title="95 % from", format=".2f"),
            alt.Tooltip("high:Q", title="to", format=".2f"),
            alt.Tooltip("seeds:N", title="seeds"),
        ]

    def finish(self, chart: alt.LayerChart, height: float, legend: bool = False) -> alt.LayerChart:
        """Add what every chart has: its height, the two filters, and the legend's own."""
        chart = chart.properties(height=height).add_params(
            alt.param(name="methods", value=list(self.marks)),
            alt.param(name="seeds", value=self.seeds),
        )
        if not legend:
            return chart
        # The first click on a legend keeps that method, further ones add or remove; the page
        # passes the choice on to every chart.
        pick = alt.selection_point(name="legend", fields=["method"], bind="legend", toggle="true")
        return chart.transform_filter(pick).add_params(pick)


def inline(frame: pd.DataFrame) -> alt.InlineData:
    """Rows as JSON values; NaN becomes null."""
    return alt.InlineData(values=json.loads(frame.to_json(orient="records", double_precision=10)))


def log_ticks(values: pd.Series) -> list[float]:
    """Few, round ticks: 1, 2, 5 over a short range, 1, 3 over a longer one, then powers of ten."""
    positive = values[values > 0]
    low, high = math.floor(math.log10(positive.min())), math.ceil(math.log10(positive.max()))
    steps = (1, 2, 5) if high - low <= 2 else (1, 3) if high - low <= 4 else (1,)
    return [step * 10.0**power for power in range(low, high + 1) for step in steps]
