"""The drawings, one method each.

Two parameters, `methods` and `seeds`, filter every chart; the page sets them in all views at
once. Data travel inside the specification, so a chart needs nothing but itself.
"""

from __future__ import annotations

import altair as alt
import pandas as pd

from .canvas import FEW_TICKS, INK, RUN_CHOSEN, SOFT, SUBSET_CHOSEN, Canvas, inline, log_ticks
from .summary import BASELINE


class Drawer(Canvas):
    """Draws one report's charts from tidy frames."""

    def loss(self, curves: pd.DataFrame, y_title: str, name: str = "loss") -> alt.LayerChart:
        """Mean over seeds, with a band from the lowest to the highest seed."""
        base = (
            alt.Chart(inline(curves))
            .transform_filter(RUN_CHOSEN)
            .transform_aggregate(
                mean="mean(loss)",
                lowest="min(loss)",
                highest="max(loss)",
                runs="count()",
                groupby=["arm", "method", "step"],
            )
            .encode(
                x=alt.X("step:Q", title="training step", axis=alt.Axis(grid=False)),
                color=self.color("stroke"),
                detail="arm:N",
            )
        )
        band = base.mark_area(opacity=0.16).encode(
            y=alt.Y("lowest:Q", title=y_title, scale=alt.Scale(zero=False)), y2="highest:Q"
        )
        line = base.mark_line(strokeWidth=2).encode(y="mean:Q")
        hover = alt.selection_point(
            name=f"{name}_hover", nearest=True, on="pointerover", clear="pointerout",
            fields=["arm", "step"], empty=False,
        )  # fmt: skip
        dots = (
            base.mark_point(filled=True, size=60)
            .encode(
                y="mean:Q",
                opacity=alt.condition(hover, alt.value(1), alt.value(0)),
                tooltip=[
                    alt.Tooltip("arm:N", title="method"),
                    alt.Tooltip("step:Q"),
                    alt.Tooltip("mean:Q", title="loss, mean over seeds", format=".4f"),
                    alt.Tooltip("lowest:Q", title="lowest seed", format=".4f"),
                    alt.Tooltip("highest:Q", title="highest seed", format=".4f"),
                    alt.Tooltip("runs:Q", title="seeds"),
                ],
            )
            .add_params(hover)
        )
        return self.finish(alt.layer(band, line, dots), 300, legend=True)

    def score(self, rows: pd.DataFrame, runs: pd.DataFrame, majority: float | None):
        """Mean and 95 % interval per method, one small dot a run, the majority class dashed."""
        base = alt.Chart(inline(rows)).transform_filter(SUBSET_CHOSEN)
        base = base.encode(y=self.rows(), color=self.color(None))
        x = alt.X(
            "low:Q",
            title=f"{self.metric}, %",
            scale=alt.Scale(zero=False, padding=12),
            axis=alt.Axis(tickCount=FEW_TICKS),
        )
        interval = base.mark_rule(strokeWidth=3.5, strokeCap="round", opacity=0.75)
        mean = base.mark_point(filled=True, size=95, opacity=1).encode(
            x="score:Q", tooltip=self.score_tooltip()
        )
        each = (
            alt.Chart(inline(runs))
            .transform_filter(RUN_CHOSEN)
            .mark_point(size=24, yOffset=9, opacity=0.9, strokeWidth=1.4)
            .encode(
                y=self.rows(),
                x="score:Q",
                color=self.color(None),
                tooltip=[
                    alt.Tooltip("arm:N", title="method"),
                    alt.Tooltip("seed:N"),
                    alt.Tooltip("score:Q", title=f"{self.metric}, %", format=".2f"),
                    alt.Tooltip("run_id:N", title="run"),
                ],
            )
        )
        layers = [interval.encode(x=x, x2="high:Q", tooltip=self.score_tooltip()), each, mean]
        if majority is not None:
            guess = alt.Chart(alt.InlineData(values=[{"majority": majority}]))
            layers += [
                guess.mark_rule(strokeDash=[5, 4], color=SOFT).encode(x="majority:Q"),
                guess.mark_text(align="left", dx=5, dy=-7, color=SOFT, fontSize=12).encode(
                    x="majority:Q",
                    y=alt.value(0),
                    text=alt.value(f"majority class {majority:.1f} %"),
                ),
            ]
        return self.finish(alt.layer(*layers), 34 * len(self.arms))

    def difference(self, rows: pd.DataFrame) -> alt.LayerChart:
        """Paired difference to the baseline. Hollow means a tie."""
        label = "datum.verdict == 'tie' ? 'tie' : format(datum.difference, '+.1f')"
        base = (
            alt.Chart(inline(rows[rows["method"] != BASELINE]))
            .transform_filter(SUBSET_CHOSEN)
            .transform_filter("isValid(datum.difference)")
            .transform_calculate(label=label)
            .encode(y=self.rows(without_baseline=True), color=self.color(None))
        )
        tooltip = [
            alt.Tooltip("arm:N", title="method"),
            alt.Tooltip("difference:Q", title=f"points to {BASELINE}", format="+.2f"),
            alt.Tooltip("difference_low:Q", title="95 % from", format="+.2f"),
            alt.Tooltip("difference_high:Q", title="to", format="+.2f"),
            alt.Tooltip("verdict:N"),
        ]
        interval = base.mark_rule(strokeWidth=3.5, strokeCap="round", opacity=0.75).encode(
            x=alt.X(
                "difference_low:Q",
                title=f"difference to {BASELINE}, points",
                scale=alt.Scale(padding=10),
                axis=alt.Axis(
                    tickCount=FEW_TICKS,
                    labelExpr="datum.value === 0 ? '0' : format(datum.value, '+.4~g')",
                ),
            ),
            x2="difference_high:Q",
            tooltip=tooltip,
        )
        point = base.mark_point(size=95, opacity=1, strokeWidth=2).encode(
            x="difference:Q",
            fill=alt.condition("datum.verdict == 'tie'", alt.value("white"), self.color(None)),
            tooltip=tooltip,
        )
        text = base.mark_text(dy=-13, fontSize=12).encode(
            x="difference:Q", text="label:N", color=alt.value(SOFT)
        )
        zero = alt.Chart(alt.InlineData(values=[{"zero": 0}]))
        zero = zero.mark_rule(color=INK, strokeWidth=1).encode(x="zero:Q")
        return self.finish(alt.layer(zero, interval, point, text), 38 * len(self.arms))

    def cost(self, rows: pd.DataFrame) -> alt.LayerChart:
        """Seconds to initialize (log) against score with its interval."""
        base = (
            alt.Chart(inline(rows[rows["init_seconds"] > 0]))
            .transform_filter(SUBSET_CHOSEN)
            .encode(
                x=alt.X(
                    "init_seconds:Q",
                    title="seconds to initialize (log)",
                    scale=alt.Scale(type="log", nice=False, padding=18),
                    axis=alt.Axis(format="~g", values=log_ticks(rows["init_seconds"])),
                ),
                color=self.color("symbol"),
                tooltip=[
                    *self.score_tooltip(),
                    alt.Tooltip("init_seconds:Q", title="seconds to initialize", format=".3g"),
                ],
            )
        )
        interval = base.mark_rule(strokeWidth=2.5, opacity=0.6).encode(
            y=alt.Y("low:Q", title=f"{self.metric}, %", scale=alt.Scale(zero=False, padding=10)),
            y2="high:Q",
        )
        point = base.mark_point(filled=True, size=110, opacity=1).encode(
            y="score:Q", shape=self.shape()
        )
        return self.finish(alt.layer(interval, point), 280, legend=True)

    def layers(self, layers: pd.DataFrame, field: str, title: str) -> alt.LayerChart:
        """Heat map, layer by method: mean of `field` over seeds; grey where it is not defined."""
        order = layers.sort_values("layer_order")["layer"].drop_duplicates().tolist()
        tall = max(200, min(15 * len(order), 900))
        columns = ["arm", "method", "seed", "layer", "shape", "rank", "relative_norm", "error"]
        columns += [] if field in columns else [field]
        base = (
            alt.Chart(inline(layers[columns]))
            .transform_filter(RUN_CHOSEN)
            .transform_aggregate(
                value=f"mean({field})",
                relative_norm="mean(relative_norm)",
                rank="mean(rank)",
                error="mean(error)",
                known=f"valid({field})",
                groupby=["arm", "method", "layer", "shape"],
            )
            .encode(
                x=alt.X(
                    "arm:N", sort=self.arms, title=None,
                    axis=alt.Axis(orient="top", labelAngle=-40, ticks=False, domain=False,
                                  labelLimit=150, labelOverlap=False),
                ),
                y=alt.Y(
                    "layer:N", sort=order, title=None,
                    axis=alt.Axis(ticks=False, domain=False, labelFontSize=10.5, labelLimit=170,
                                  labelPadding=6, labelOverlap=True),
                ),
                tooltip=[
                    alt.Tooltip("arm:N", title="method"),
                    alt.Tooltip("layer:N"),
                    alt.Tooltip("shape:N", title="weight (out × in)"),
                    alt.Tooltip("rank:Q", format=".4g"),
                    alt.Tooltip("value:Q", title=title, format=".4g"),
                    alt.Tooltip("relative_norm:Q", title="‖sBA‖ / ‖W‖", format=".4g"),
                    alt.Tooltip("error:Q", title="error", format=".4g"),
                ],
            )
        )  # fmt: skip
        color = alt.Color(
            "value:Q",
            title=title,
            scale=alt.Scale(scheme="viridis", reverse=True, zero=True),
            legend=alt.Legend(
                orient="bottom", direction="horizontal", gradientLength=200, format="~g",
                gradientThickness=10, titleLimit=300,
            ),
        )  # fmt: skip
        known = (
            base.transform_filter("datum.known > 0")
            .mark_rect(stroke="white", strokeWidth=0.7)
            .encode(color=color)
        )
        unknown = base.transform_filter("datum.known == 0").mark_rect(
            color="#eef0f3", stroke="white", strokeWidth=0.7
        )
        return self.finish(alt.layer(unknown, known), tall)

    def strip(self, frame: pd.DataFrame, field: str, title: str, log: bool) -> alt.LayerChart:
        """One tick per layer or run, the mean as a point."""
        scale = alt.Scale(type="log", nice=False, padding=18) if log else alt.Scale(zero=True)
        axis = (
            alt.Axis(values=log_ticks(frame[field]), format="~g") if log else alt.Axis(tickCount=6)
        )
        base = (
            alt.Chart(inline(frame))
            .transform_filter(RUN_CHOSEN)
            .encode(y=self.rows(), color=self.color(None))
        )
        tooltip = [alt.Tooltip("arm:N", title="method"), alt.Tooltip("seed:N")]
        tooltip += [alt.Tooltip("layer:N")] if "layer" in frame else []
        tooltip += [alt.Tooltip(f"{field}:Q", title=title, format=".4g")]
        each = base.mark_tick(thickness=2, size=15, opacity=0.45).encode(
            x=alt.X(f"{field}:Q", title=title, scale=scale, axis=axis), tooltip=tooltip
        )
        mean = base.mark_point(filled=True, size=70, opacity=1).encode(
            x=f"mean({field}):Q",
            tooltip=[
                alt.Tooltip("arm:N", title="method"),
                alt.Tooltip(f"mean({field}):Q", title=f"mean {title}", format=".4g"),
            ],
        )
        return self.finish(alt.layer(each, mean), 26 * len(self.arms))
