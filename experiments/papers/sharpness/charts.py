"""Tables and figures of the starts' sharpness."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import numpy as np
import pandas as pd

from experiments.papers.drawing import chart, methods_color
from experiments.papers.findings import Figure, Table
from experiments.papers.sharpness.claims import PAPER, ratios
from experiments.report.canvas import INK, SOFT
from experiments.report.palette import ordered


def tables(rows: pd.DataFrame, rates: Mapping[str, float]) -> list[Table]:
    new = rows[rows["head"] == "new"]
    found, trained = ratios(rows, "new"), ratios(rows, "trained")
    lines = []
    for method in ordered(set(rows["method"])):
        some = new[new["method"] == method]
        ratio = found.get(method)
        line = {
            "method": method,
            "λmax": some["largest"].mean(),
            "over LoRA": ratio.value if ratio else None,
            "low": ratio.low if ratio else None,
            "high": ratio.high if ratio else None,
            "paper": PAPER.get(method),
            "λmin": some["smallest"].mean(),
            "‖g‖": some["gradient"].mean(),
            "Adam’s first step": geometric(some["sign step"]),
            "best rate": rates.get(method),
        }
        if trained:
            line["over LoRA, trained head"] = trained[method].value if method in trained else None
        lines.append(line)
    frame = pd.DataFrame(lines)
    # What no method has (a smoke form without any of the paper's) is no column.
    frame = frame.dropna(axis="columns", how="all")
    return [
        Table(
            "sharpness", "Curvature at the start, means over batches", frame,
            {"best rate": ".2g", "Adam’s first step": ".2g", "paper": ".0f"},
            "λmax over LoRA’s: geometric means over batches with 95 % intervals. Adam’s first "
            "step: the rate that a quadratic model likes best for it; – where the loss bends "
            "downwards along the gradient’s signs on some batch.",
        )
    ]  # fmt: skip


def geometric(values: pd.Series) -> float | None:
    """The geometric mean; None where a value is not finite."""
    return float(np.exp(np.log(values).mean())) if np.isfinite(values).all() else None


def figures(rows: pd.DataFrame, rates: Mapping[str, float]) -> list[Figure]:
    drawn = [
        Figure(
            "ratios", "Sharpness at the start, over LoRA’s",
            "λmax of the Hessian with respect to the adapter, geometric means over batches with "
            "95 % intervals. Dark ticks: the paper’s multiples (Qwen3-0.6B; of OLoRA and LoRA-GA, "
            "“up to”).", bars(rows),
        )
    ]  # fmt: skip
    if len(rates) >= 2:
        drawn.append(
            Figure(
                "rates", "The best learning rate against curvature",
                "Left, λmax under the new head; dashed: a rate in proportion to 1 / λmax. Right, "
                "the rate that a quadratic model likes best for Adam’s first step; dashed: a rate "
                "in proportion to it. Both dashed lines go through kaiming.",
                scatter(rows, rates), width=None,
            )
        )  # fmt: skip
    return drawn


def bars(rows: pd.DataFrame) -> alt.LayerChart:
    lines = [
        {"method": method, "ratio": r.value, "low": r.low, "high": r.high,
         "paper": PAPER.get(method), "label": f"{r.value:.2g}×"}
        for method, r in ratios(rows, "new").items()
    ]  # fmt: skip
    frame = pd.DataFrame(lines).sort_values("ratio", ascending=False)
    methods = frame["method"].tolist()
    # An interval of two batches may span decades: it is cut off rather than the points squeezed.
    shown = pd.concat([frame["ratio"], frame["paper"].dropna()])
    domain = [min(0.5, shown.min() / 3), max(2.0, shown.max() * 3)]
    scale = alt.Scale(type="log", domain=domain, nice=False)
    ticks = [v for v in (0.01, 0.1, 1, 10, 100, 1000, 10000) if domain[0] <= v <= domain[1]]
    axis = alt.Axis(values=ticks, format="~g")
    x = alt.X("ratio:Q", title="λmax / λmax of kaiming", scale=scale, axis=axis)
    y = alt.Y("method:N", sort=methods, title=None)
    base = chart(frame)
    rule = base.mark_rule(strokeWidth=3, opacity=0.55, clip=True).encode(
        y=y, x=alt.X("low:Q", title=None, scale=scale, axis=axis), x2="high:Q",
        color=methods_color(methods, legend=False),
    )  # fmt: skip
    point = base.mark_circle(size=110, opacity=1).encode(
        y=y, x=x, color=methods_color(methods, legend=False),
        tooltip=["method:N", alt.Tooltip("ratio:Q", format=".3g"),
                 alt.Tooltip("low:Q", format=".3g"), alt.Tooltip("high:Q", format=".3g")],
    )  # fmt: skip
    tick = (
        chart(frame.dropna(subset="paper"))
        if frame["paper"].notna().any()
        else chart(frame.head(0))
    )
    published = tick.mark_tick(thickness=3, size=18, color=INK).encode(
        y=y, x=alt.X("paper:Q", title=None, scale=scale, axis=axis)
    )
    words = base.mark_text(align="left", dx=9, dy=-9, fontSize=11, color=SOFT).encode(
        y=y, x=x, text="label:N"
    )
    one = alt.Chart(pd.DataFrame({"x": [1.0]})).mark_rule(color="#b9c0c8").encode(
        x=alt.X("x:Q", title=None, scale=scale, axis=axis)
    )  # fmt: skip
    return alt.layer(one, rule, published, point, words).properties(height=30 * len(methods))


def scatter(rows: pd.DataFrame, rates: Mapping[str, float]) -> alt.HConcatChart:
    new = rows[rows["head"] == "new"]
    panels = []
    for quantity, title, power in (
        ("largest", "λmax", -1.0),
        ("sign step", "best rate of Adam’s first step", 1.0),
    ):
        means = {m: geometric(some[quantity]) for m, some in new.groupby("method")}
        points = pd.DataFrame(
            {"method": m, "x": means[m], "rate": rates[m]}
            for m in ordered(set(rates) & set(means)) if means[m] and means[m] > 0
        )  # fmt: skip
        if len(points) >= 2:
            panels.append(rate_panel(points, title, power))
    return alt.hconcat(*panels, spacing=24).resolve_scale(color="shared")


def rate_panel(points: pd.DataFrame, title: str, power: float) -> alt.LayerChart:
    methods = points["method"].tolist()
    spread = [points["x"].min() / 1.5, points["x"].max() * 1.5]
    heights = [points["rate"].min() / 2, points["rate"].max() * 2]
    x = alt.X("x:Q", title=title, scale=alt.Scale(type="log", domain=spread, nice=False),
              axis=alt.Axis(tickCount=4, format="~g"))  # fmt: skip
    y = alt.Y(
        "rate:Q", title="best learning rate",
        scale=alt.Scale(type="log", domain=heights, nice=False),
        axis=alt.Axis(format="~e", tickCount=4),
    )  # fmt: skip
    layers = []
    if "kaiming" in methods:
        anchor = points.set_index("method").loc["kaiming"]
        ends = np.geomspace(*spread, 50)
        line = pd.DataFrame({"x": ends, "rate": anchor["rate"] * (ends / anchor["x"]) ** power})
        line = line[line["rate"].between(*heights)]
        layers.append(chart(line).mark_line(strokeDash=[5, 4], color="#b9c0c8").encode(x=x, y=y))
    layers.append(
        chart(points)
        .mark_circle(size=130, opacity=1)
        .encode(
            x=x, y=y, color=methods_color(methods),
            tooltip=["method:N", alt.Tooltip("x:Q", format=".3g", title=title),
                     alt.Tooltip("rate:Q", format=".2e")],
        )
    )  # fmt: skip
    return alt.layer(*layers).properties(width=262, height=250)
