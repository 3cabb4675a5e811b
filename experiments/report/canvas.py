"""What all charts of a report share: rows, colors, filters, tooltips, round ticks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import altair as alt
import pandas as pd

from .palette import BASELINE, Mark
from .quantities import Quantity

ARM_CHOSEN = (
    "indexof(methods, datum.method) >= 0 && indexof(ranks, datum.rank) >= 0 "
    "&& indexof(tasks, datum.task) >= 0"
)
RUN_CHOSEN = f"{ARM_CHOSEN} && (rates == 'all' || datum.best)"
# The ends of an interval's bar. Without an interval both are the mean, because axes need values.
# Tooltips show `low` and `high`, which are then missing.
BAR = {
    "bottom": "isValid(datum.low) ? datum.low : datum.score",
    "top": "isValid(datum.high) ? datum.high : datum.score",
}
INK, SOFT, GRID = "#24292f", "#57606a", "#e7eaee"
ON_PAGE = "_on_page"  # suffix of layers that show only under the mouse; files omit them
CLOSE_TICKS = (1, 1.3, 1.6, 2, 2.5, 3, 4, 5, 6, 8)
FEW_TICKS = alt.ExprRef("width < 320 ? 4 : 7")
METHOD = ("arm:N", "method")
RATE = ("learning_rate:Q", "learning rate", "~g")


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and caption.

    Attributes:
        section: the page's heading above it.
        wide: whether it uses both columns of a wide page.
        parameter, choices: a parameter of this chart, its values and their labels, which the page
            offers as a list. The first value is the initial one.
        every_rank: whether the drawing shows all ranks, whatever the filter says.
        all_drawn: whether every choice is drawn as a file, or only the first.
    """

    name: str
    title: str
    caption: str
    drawing: alt.LayerChart
    section: str
    wide: bool = False
    parameter: str | None = None
    choices: dict[str, str] = field(default_factory=dict)
    every_rank: bool = False
    all_drawn: bool = True


@dataclass(frozen=True)
class Canvas:
    """The arms in order, the methods' marks, the filters' values and their initial choice."""

    arms: list[str]
    marks: dict[str, Mark]
    metric: str
    filters: dict[str, list]
    initial: dict[str, list]

    @property
    def rows_at_first(self) -> int:
        """About how many arms the initial filters show."""
        return -(-len(self.arms) * len(self.initial["ranks"]) // len(self.filters["ranks"]))

    def shown_first(self, chart: Chart) -> str:
        """The suffix of a file's title: the one rank and task of several that it shows."""
        parts = []
        if not chart.every_rank and len(self.initial["ranks"]) < len(self.filters["ranks"]):
            parts.append(", ".join(f"rank {rank:g}" for rank in self.initial["ranks"]))
        if len(self.initial["tasks"]) < len(self.filters["tasks"]):
            parts += self.initial["tasks"]
        return f" ({', '.join(parts)})" if parts else ""

    def quantity_label(self, quantity: Quantity) -> str:
        """The quantity with its unit, by the score's own name."""
        name = self.metric if quantity.name == "score" else quantity.label
        return f"{name}, {quantity.unit}" if quantity.unit else name

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
        """The methods' fixed colors; the legend's symbol is "stroke", "symbol" or None."""
        scale = alt.Scale(domain=list(self.marks), range=[m.color for m in self.marks.values()])
        drawn = None if legend is None else self.legend(legend)
        return alt.Color("method:N", scale=scale, legend=drawn)

    def shape(self) -> alt.Shape:
        scale = alt.Scale(domain=list(self.marks), range=[m.shape for m in self.marks.values()])
        return alt.Shape("method:N", scale=scale, legend=self.legend("symbol"))

    def legend(self, kind: str) -> alt.Legend:
        stroke = {"symbolType": "stroke", "symbolStrokeWidth": 3} if kind == "stroke" else {}
        # The page sets `legend_columns` before it draws. If the number followed the width, rows
        # that appear while Vega fits the chart would be cut off.
        return alt.Legend(
            title=None, orient="bottom", columns=alt.ExprRef("legend_columns"), symbolOpacity=1,
            offset=14, labelLimit=240, **stroke,
        )  # fmt: skip

    def score_tooltip(self) -> list[alt.Tooltip]:
        score = ("score:Q", f"{self.metric}, %", ".2f")
        return tooltip(METHOD, RATE, score, *interval_of("low", "high"), ("seeds:N", "seeds"))

    def run_tooltip(self, *more: tuple[str, ...]) -> list[alt.Tooltip]:
        """Names the run under the mouse."""
        return tooltip(METHOD, RATE, ("seed:N", "seed"), *more, ("run_id:N", "run"))

    def bars(self, base: alt.Chart, x: alt.X, high: str, tips: list[alt.Tooltip]) -> alt.Chart:
        """An interval in each row of `base`, from the field of `x` to `high`."""
        bar = base.mark_rule(strokeWidth=3.5, strokeCap="round", opacity=0.75)
        return bar.encode(x=x, x2=alt.X2(f"{high}:Q"), tooltip=tips)

    def finish(
        self, chart: alt.LayerChart, height: float | alt.Step, legend: bool = False
    ) -> alt.LayerChart:
        """Add the height, the filters, and the selection of a legend."""
        params = [alt.param(name=name, value=value) for name, value in self.initial.items()]
        params += [alt.param(name="rates", value="best"), alt.param(name="legend_columns", value=4)]
        if legend:
            # The first click on a legend keeps that method, further clicks add or remove. The page
            # applies the choice to every chart.
            pick = alt.selection_point(
                name="legend", fields=["method"], bind="legend", toggle="true"
            )
            chart = chart.transform_filter(pick)
            params.append(pick)
        chart.height = height  # Altair's `properties` copies every layer once more
        return chart.add_params(*params)


def tooltip(*fields: tuple[str, ...]) -> list[alt.Tooltip]:
    """Tooltips from tuples of a field, its title and its format."""
    return [
        alt.Tooltip(field, title=title, **({"format": form[0]} if form else {}))
        for field, title, *form in fields
    ]


def interval_of(low: str, high: str, form: str = ".2f") -> list[tuple[str, ...]]:
    return [(f"{low}:Q", "95 % from", form), (f"{high}:Q", "to", form)]


def records(frame: pd.DataFrame) -> list[dict]:
    """Rows as JSON values; NaN becomes null."""
    return json.loads(frame.to_json(orient="records", double_precision=10))


def log_ticks(values: pd.Series) -> list[float]:
    """A few round ticks: 1, 2, 5 over a short range, 1, 3 over a longer one, else powers of ten.

    There are more of them if all values lie within a factor of four.
    """
    positive = values[values > 0]
    low, high = math.floor(math.log10(positive.min())), math.ceil(math.log10(positive.max()))
    if positive.max() < 4 * positive.min():
        return [step * 10.0**power for power in range(low, high + 1) for step in CLOSE_TICKS]
    steps = (1, 2, 5) if high - low <= 2 else (1, 3) if high - low <= 4 else (1,)
    return [step * 10.0**power for power in range(low, high + 1) for step in steps]


def wants_log(values: pd.Series) -> bool:
    """Whether values suit a logarithmic axis: positive, and over a factor of more than twenty."""
    known = values.dropna()
    return len(known) > 0 and known.min() > 0 and known.max() > 20 * known.min()
