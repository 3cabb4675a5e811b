"""Tables and figures of the starts' sharpness."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import numpy as np
import pandas as pd

from experiments.papers.drawing import chart, methods_color
from experiments.papers.reproduction import Figure, Table
from experiments.papers.sharpness.claims import PAPER, first_steps, ratios
from experiments.report.canvas import INK
from experiments.report.palette import marks, ordered


def tables(rows: pd.DataFrame, rates: Mapping[str, float]) -> list[Table]:
    new, trained, steps = ratios(rows, "new"), ratios(rows, "trained"), first_steps(rows, "new")
    means = rows.groupby(["head", "method"])[["largest", "smallest", "gradient"]].mean()
    lines = []
    for method in ordered(set(rows["method"])):
        ratio = trained.get(method)
        here = means.loc["new", method]
        lines.append(
            {
                "method": method,
                "λmax, trained head": means.loc[("trained", method), "largest"],
                "over LoRA": ratio.value if ratio else None,
                "low": ratio.low if ratio else None,
                "high": ratio.high if ratio else None,
                "paper": PAPER.get(method),
                "λmax, new head": here["largest"],
                "over LoRA, new head": new[method].value if method in new else None,
                "λmin": here["smallest"],
                "‖g‖": here["gradient"],
                "Adam’s first step": steps.get(method),
                "best rate": rates.get(method),
            }
        )
    frame = pd.DataFrame(lines)
    # What no method has (a smoke form without any of the paper's) is no column.
    frame = frame.dropna(axis="columns", how="all")
    return [
        Table(
            "sharpness", "Curvature at the start, means over batches", frame,
            {"best rate": ".2g", "Adam’s first step": ".2g", "paper": ".0f"},
            "λmax over LoRA’s: geometric means over batches with 95 % intervals, under a head that "
            "was trained first. λmin, ‖g‖ and what follows: under the new head. Adam’s first step: "
            "the rate that a quadratic model likes best for it; – where the loss bends downwards "
            "along the gradient’s signs, on average over the batches. Best rate: – where no sweep "
            "has tuned it.",
        )
    ]  # fmt: skip


def figures(rows: pd.DataFrame, rates: Mapping[str, float]) -> list[Figure]:
    drawn = [
        Figure(
            "ratios", "Sharpness at the start, over LoRA’s",
            "λmax of the Hessian with respect to the adapter, geometric means over batches: "
            "discs with 95 % intervals under a head that was trained first, rings under a new one. "
            "Dark ticks: the paper’s multiples (Qwen3-0.6B; of OLoRA and LoRA-GA, “up to”).",
            bars(rows),
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
    new = ratios(rows, "new")
    lines = [
        {"method": method, "ratio": r.value, "low": r.low, "high": r.high,
         "new": new[method].value if method in new else None, "paper": PAPER.get(method)}
        for method, r in ratios(rows, "trained").items()
    ]  # fmt: skip
    frame = pd.DataFrame(lines).sort_values("ratio", ascending=False)
    methods = frame["method"].tolist()
    # An interval of few batches may span decades: it is cut off rather than the points squeezed.
    shown = pd.concat([frame["ratio"], *(frame[n].dropna() for n in ("paper", "new"))])
    domain = [min(0.5, shown.min() / 2), max(2.0, shown.max() * 2)]
    scale = alt.Scale(type="log", domain=domain, nice=False)
    ticks = [v for v in (0.01, 0.1, 1, 10, 100, 1000, 10000) if domain[0] <= v <= domain[1]]
    y = alt.Y("method:N", sort=methods, title=None)
    color = methods_color(methods, legend=False)

    def x(field: str) -> alt.X:
        axis = alt.Axis(values=ticks, format="~g")
        return alt.X(f"{field}:Q", title="λmax / λmax of kaiming", scale=scale, axis=axis)

    tooltip = ["method:N", *(alt.Tooltip(f"{n}:Q", format=".3g")
                             for n in ("ratio", "low", "high", "new", "paper"))]  # fmt: skip
    base = chart(frame)
    layers = [
        alt.Chart(pd.DataFrame({"x": [1.0]})).mark_rule(color="#b9c0c8").encode(x=x("x")),
        base.mark_rule(strokeWidth=3, opacity=0.55, clip=True).encode(
            y=y, x=x("low"), x2="high:Q", color=color
        ),
        base.mark_circle(size=110, opacity=1).encode(y=y, x=x("ratio"), color=color,
                                                     tooltip=tooltip),
        base.mark_point(size=110, filled=False, strokeWidth=2, opacity=1).encode(
            y=y, x=x("new"), color=color, tooltip=tooltip
        ),
    ]  # fmt: skip
    if frame["paper"].notna().any():
        published = chart(frame.dropna(subset="paper"))
        layers.append(
            published.mark_tick(thickness=3, size=18, color=INK).encode(y=y, x=x("paper"))
        )
    return alt.layer(*layers).properties(height=30 * len(methods))


def scatter(rows: pd.DataFrame, rates: Mapping[str, float]) -> alt.HConcatChart:
    new = rows[(rows["head"] == "new") & (rows["largest"] > 0)]
    logs = np.log(new.set_index("method")["largest"]).groupby(level=0).mean()
    steps = first_steps(rows, "new")
    methods = ordered(set(rates) & set(logs.index))
    panels = []
    for values, title, power in (
        (np.exp(logs).to_dict(), "λmax", -1.0),
        (steps, "best rate of Adam’s first step", 1.0),
    ):
        points = pd.DataFrame(
            {"method": m, "x": values[m], "rate": rates[m]} for m in methods if m in values
        )
        if len(points) >= 2:
            panels.append(rate_panel(points, methods, title, power))
    return alt.hconcat(*panels, spacing=24)


def rate_panel(
    points: pd.DataFrame, methods: list[str], title: str, power: float
) -> alt.LayerChart:
    """A point a method; two that coincide are told apart by their shapes."""
    spread = [points["x"].min() / 1.5, points["x"].max() * 1.5]
    heights = [points["rate"].min() / 2, points["rate"].max() * 2]
    ticks = [base * 10.0**power for power in range(-6, 6) for base in (1, 3)]
    x = alt.X(
        "x:Q", title=title, scale=alt.Scale(type="log", domain=spread, nice=False),
        axis=alt.Axis(
            values=[v for v in ticks if spread[0] <= v <= spread[1]], format="~g",
        ),
    )  # fmt: skip
    y = alt.Y(
        "rate:Q", title="best learning rate",
        scale=alt.Scale(type="log", domain=heights, nice=False),
        axis=alt.Axis(values=[v for v in ticks if heights[0] <= v <= heights[1]], format="~e"),
    )  # fmt: skip
    chosen = marks(methods)
    shapes = alt.Scale(domain=methods, range=[chosen[m].shape for m in methods])
    legend = alt.Legend(title=None, orient="bottom", columns=4)
    layers = []
    if "kaiming" in set(points["method"]):
        anchor = points.set_index("method").loc["kaiming"]
        ends = np.geomspace(*spread, 50)
        line = pd.DataFrame({"x": ends, "rate": anchor["rate"] * (ends / anchor["x"]) ** power})
        line = line[line["rate"].between(*heights)]
        layers.append(chart(line).mark_line(strokeDash=[5, 4], color="#b9c0c8").encode(x=x, y=y))
    layers.append(
        chart(points)
        .mark_point(size=120, filled=False, strokeWidth=2.4, opacity=1)
        .encode(
            x=x, y=y, color=methods_color(methods),
            shape=alt.Shape("method:N", scale=shapes, legend=legend),
            tooltip=["method:N", alt.Tooltip("x:Q", format=".3g", title=title),
                     alt.Tooltip("rate:Q", format=".2e")],
        )
    )  # fmt: skip
    return alt.layer(*layers).properties(width=262, height=250)
