"""What all charts of one report share: rows, colours, filters, tooltips, round ticks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import altair as alt
import pandas as pd

from .palette import BASELINE, Mark

ARM_CHOSEN = (
    "indexof(methods, datum.method) >= 0 && indexof(ranks, datum.rank) >= 0 "
    "&& indexof(tasks, datum.task) >= 0"
)
OVER_TASKS = "indexof(methods, datum.method) >= 0 && indexof(ranks, datum.rank) >= 0"
SEED_CHOSEN = f"{ARM_CHOSEN} && indexof(seeds, datum.seed) >= 0"
RUN_CHOSEN = f"{SEED_CHOSEN} && (rates == 'all' || datum.best)"
SUBSET_CHOSEN = f"{ARM_CHOSEN} && datum.seeds == join(seeds, ',')"
# Where an interval's bar ends: at the mean itself where there is none, since an axis must begin
# somewhere. Tooltips show `low` and `high`, which are then missing.
BAR = {
    "bottom": "isValid(datum.low) ? datum.low : datum.score",
    "top": "isValid(datum.high) ? datum.high : datum.score",
}
INK, SOFT, GRID = "#24292f", "#57606a", "#e7eaee"
ON_PAGE = "_on_page"  # ends the name of a layer that shows only under the mouse: files go without
CLOSE_TICKS = (1, 1.3, 1.6, 2, 2.5, 3, 4, 5, 6, 8)
FEW_TICKS = alt.ExprRef("width < 320 ? 4 : 7")


@dataclass(frozen=True)
class Chart:
    """A drawing with the words that belong to it.

    Attributes:
        section: the heading of the page that it stands under.
        wide: whether it takes both columns of a wide page.
        parameter, choices: a parameter of this chart alone, its values and their names, which the
            page offers as a list; the first is what the chart begins with.
        over: the filter that the drawing spans by itself: "ranks" or "tasks".
        all_drawn: whether there are files of every choice, or of the first only.
    """

    name: str
    title: str
    caption: str
    drawing: alt.LayerChart
    section: str
    wide: bool = False
    parameter: str | None = None
    choices: dict[str, str] = field(default_factory=dict)
    over: str | None = None
    all_drawn: bool = True


@dataclass(frozen=True)
class Canvas:
    """The arms in order, the methods' marks, the filters' values and how they begin."""

    arms: list[str]
    marks: dict[str, Mark]
    metric: str
    filters: dict[str, list]
    initial: dict[str, list]

    @property
    def rows_at_first(self) -> int:
        """How many arms are shown before anyone filters, about."""
        return -(-len(self.arms) * len(self.initial["ranks"]) // len(self.filters["ranks"]))

    def told(self, chart: Chart) -> str:
        """What a file of the chart must say in its title: the one rank and task of several that
        it shows."""
        parts = []
        if chart.over != "ranks" and len(self.initial["ranks"]) < len(self.filters["ranks"]):
            parts.append(", ".join(f"rank {rank:g}" for rank in self.initial["ranks"]))
        if chart.over != "tasks" and len(self.initial["tasks"]) < len(self.filters["tasks"]):
            parts += self.initial["tasks"]
        return f" ({', '.join(parts)})" if parts else ""

    def table(self, name: str) -> alt.Chart:
        return alt.Chart(alt.NamedData(name))

    def rows(self, without_baseline: bool = False) -> alt.Y:
        """A row per arm, in the report's order."""
        arms = [a for a in self.arms if not (without_baseline and a.split(" · ")[0] == BASELINE)]
        axis = alt.Axis(
            ticks=False, domain=False, grid=True, labelPadding=8,
            labelLimit=alt.ExprRef("width < 260 ? 120 : 220"),
        )  # fmt: skip
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
        # The page sets `legend_columns` before it draws: with a number that followed the width
        # the rows that appear while the chart is fitted would be cut off.
        return alt.Legend(
            title=None, orient="bottom", columns=alt.ExprRef("legend_columns"), symbolOpacity=1,
            offset=14, labelLimit=240, **stroke,
        )  # fmt: skip

    def score_tooltip(self) -> list[alt.Tooltip]:
        return [
            alt.Tooltip("arm:N", title="method"),
            alt.Tooltip("learning_rate:Q", title="learning rate", format="~g"),
            alt.Tooltip("score:Q", title=f"{self.metric}, %", format=".2f"),
            alt.Tooltip("low:Q", title="95 % from", format=".2f"),
            alt.Tooltip("high:Q", title="to", format=".2f"),
            alt.Tooltip("seeds:N", title="seeds"),
        ]

    def run_tooltip(self, *more: alt.Tooltip) -> list[alt.Tooltip]:
        """Names the run that the mouse is over."""
        return [
            alt.Tooltip("arm:N", title="method"),
            alt.Tooltip("learning_rate:Q", title="learning rate", format="~g"),
            alt.Tooltip("seed:N"),
            *more,
            alt.Tooltip("run_id:N", title="run"),
        ]

    def finish(
        self, chart: alt.LayerChart, height: float | alt.Step, legend: bool = False
    ) -> alt.LayerChart:
        """Add what every chart has: its height, the filters, and the legend's own."""
        params = [alt.param(name=name, value=value) for name, value in self.initial.items()]
        params += [alt.param(name="rates", value="best"), alt.param(name="legend_columns", value=4)]
        if legend:
            # The first click on a legend keeps that method, further ones add or remove; the page
            # passes the choice on to every chart.
            pick = alt.selection_point(
                name="legend", fields=["method"], bind="legend", toggle="true"
            )
            chart = chart.transform_filter(pick)
            params.append(pick)
        chart.height = height  # Altair's `properties` copies every layer once more
        return chart.add_params(*params)


def inline(frame: pd.DataFrame) -> alt.InlineData:
    """Rows as JSON values inside a chart; NaN becomes null."""
    return alt.InlineData(values=records(frame))


def records(frame: pd.DataFrame) -> list[dict]:
    return json.loads(frame.to_json(orient="records", double_precision=10))


def log_ticks(values: pd.Series) -> list[float]:
    """Few, round ticks: 1, 2, 5 over a short range, 1, 3 over a longer one, then powers of ten;
    more of them where all values lie within a factor of four."""
    positive = values[values > 0]
    low, high = math.floor(math.log10(positive.min())), math.ceil(math.log10(positive.max()))
    if positive.max() < 4 * positive.min():
        return [step * 10.0**power for power in range(low, high + 1) for step in CLOSE_TICKS]
    steps = (1, 2, 5) if high - low <= 2 else (1, 3) if high - low <= 4 else (1,)
    return [step * 10.0**power for power in range(low, high + 1) for step in steps]


def wants_log(values: pd.Series) -> bool:
    """Whether a logarithmic axis serves: all positive, and over more than a factor of twenty."""
    known = values.dropna()
    return len(known) > 0 and known.min() > 0 and known.max() > 20 * known.min()
