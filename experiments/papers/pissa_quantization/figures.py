"""Rows -> charts."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ...report.canvas import INK, SOFT
from ..drawing import chart, methods_color
from ..reproduction import Figure
from .claims import at_judged_rank
from .options import PAPER_AVERAGES, PAPER_PARTS, PARTS
from .rows import AS_IT_IS
from .white_noise import leading_share

METHODS = ["loftq", "pissa"]
HEADER = alt.Header(labelColor=SOFT, labelFontSize=12.5, title=None, labelAnchor="start")
MEASURES = {
    "nuclear": "nuclear norm", "frobenius": "Frobenius norm", "spectral": "spectral norm",
    "output": "output error",
}  # fmt: skip
REDUCTION = "reduction of NF4’s error, %"
PANEL = 250


def figures(
    rows: pd.DataFrame, judged: dict[str, int], widths: dict[str, int], described: dict[str, str]
) -> list[Figure]:
    named = rows.assign(model=rows["model"].map(described))
    by_name = {described[model]: rank for model, rank in judged.items()}
    chosen = at_judged_rank(named, by_name)
    first = rows["T"].min()
    found = [
        Figure(
            "ranks", "How much of NF4’s error is taken back, by rank",
            "Mean over layers, nuclear norm, T alternations. Hollow: the paper’s averages over "
            "Llama-2-7B (r = 128 of 4096) and Llama-3-8B (r = 64).",
            by_rank(named, {described[model]: width for model, width in widths.items()}),
            width=None,
        ),
        Figure(
            "layers", f"By kind of layer, T = {first}",
            "At the paper’s rank per width. Black lines: what the top r directions of white noise "
            "of the same shape hold, which is all that LoftQ gets of an error without structure.",
            by_part(chosen, first), width=None,
        ),
    ]  # fmt: skip
    found += [
        Figure(
            "leads" if norm == "nuclear" else f"leads_{norm}",
            f"Where PiSSA is ahead of LoftQ (green) and where behind (pink), {told}, T = {first}",
            "PiSSA’s reduction minus LoftQ’s, points, mean over layers.",
            leads(named, first, norm), width=None,
        )
        for norm, told in MEASURES.items()
    ]  # fmt: skip
    if (rows["variant"] != AS_IT_IS).any():
        found.append(
            Figure(
                "grids", f"What a 4-bit grid does to the comparison, T = {first}",
                "The same layers at the same rank; nuclear norm. If a 4-bit origin counted "
                "through its noise, noise of that size would do the same as the grid.",
                grids(named, by_name, first), width=None,
            )
        )  # fmt: skip
    return found


def by_rank(rows: pd.DataFrame, widths: dict[str, int]) -> alt.FacetChart:
    some = rows[(rows["variant"] == AS_IT_IS) & rows["detailed"]]
    frame = some.groupby(["model", "rank", "method", "T"], as_index=False)["nuclear"].mean()
    frame["share"] = 100 * frame["rank"] / frame["model"].map(widths)
    frame["source"] = "here"
    shown = {frame["T"].min(), frame["T"].max()}
    frame = frame[frame["T"].isin(shown) & (frame["nuclear"] > 0)]
    papers = [
        {"model": model, "source": paper, "rank": rank, "share": 100 * rank / width, "T": count,
         "method": method, "nuclear": value}
        for model in frame["model"].unique()
        for (paper, rank, width), by_count in PAPER_AVERAGES.items()
        for count, values in by_count.items()
        if count in shown
        for method, value in values.items()
    ]  # fmt: skip
    first = frame[frame["rank"] == frame["rank"].min()]
    told = first.groupby(["model", "T", "share"], as_index=False)["nuclear"].mean()
    names = [paper for paper, _, _ in PAPER_AVERAGES]
    frame = pd.concat([frame, pd.DataFrame(papers), told.assign(source="label")])
    frame["T"] = "T = " + frame["T"].astype(str)
    tips = ["source:N", "method:N", "T:N", "rank:Q", alt.Tooltip("nuclear:Q", format=".1f")]
    base = alt.Chart().encode(
        x=alt.X(
            "share:Q", title="rank, % of the width",
            scale=alt.Scale(type="log", nice=False, domain=[
                0.36 * float(frame["share"].min()), 1.15 * float(frame["share"].max())
            ]),
            axis=alt.Axis(values=[0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50], grid=False),
        ),
        y=alt.Y(
            "nuclear:Q", title=REDUCTION, scale=alt.Scale(type="log", nice=False),
            axis=alt.Axis(values=[0.5, 1, 2, 5, 10, 20, 50, 100]),
        ),
        color=methods_color(METHODS),
        tooltip=tips,
    )  # fmt: skip
    lines = base.mark_line(point=alt.OverlayMarkDef(size=22), strokeWidth=2).encode(
        strokeDash=alt.StrokeDash("T:N", legend=None)
    )
    words = base.mark_text(align="right", dx=-8, fontSize=11.5).encode(
        text="T:N", color=alt.value(INK)
    )
    marks = base.mark_point(size=60, strokeWidth=2, filled=False, opacity=1).encode(
        shape=alt.Shape(
            "source:N", scale=alt.Scale(domain=names, range=["diamond", "square"]),
            legend=alt.Legend(
                title=None, orient="bottom", symbolStrokeColor=INK, symbolFillColor="transparent",
            ),
        )
    )  # fmt: skip
    layered = alt.layer(
        lines.transform_filter("datum.source === 'here'"),
        marks.transform_filter("datum.source !== 'here' && datum.source !== 'label'"),
        words.transform_filter("datum.source === 'label'"),
        data=chart(frame).data,
    ).properties(width=PANEL, height=240)
    return layered.facet(alt.Facet("model:N", header=HEADER), columns=2)


def by_part(chosen: pd.DataFrame, count: int) -> alt.FacetChart:
    some = chosen[chosen["T"] == count]
    columns = ["model", "part", "method"]
    frame = some.groupby(columns, as_index=False, sort=False)[["nuclear", "noise"]].mean()
    papers = [
        {"model": "Llama-2-7B (the paper)", "part": part, "method": method, "nuclear": value,
         "noise": 100 * leading_share(*shape, 128)}
        for part, (shape, *values) in PAPER_PARTS.items()
        for method, value in zip(METHODS, values, strict=True)
    ]  # fmt: skip
    frame = pd.concat([pd.DataFrame(papers), frame] if count == 1 else [frame])
    present = list(frame["part"].unique())
    order = [part for part in PARTS if part in present] + [p for p in present if p not in PARTS]
    rows = alt.Y(
        "part:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False),
        scale=alt.Scale(paddingInner=0.25),
    )  # fmt: skip
    tips = [f"{column}:N" for column in columns] + [
        alt.Tooltip("nuclear:Q", format=".1f"),
        alt.Tooltip("noise:Q", title="white noise", format=".1f"),
    ]
    bars = (
        alt.Chart()
        .mark_bar()
        .encode(
            x=alt.X("nuclear:Q", title=REDUCTION),
            y=rows,
            yOffset=alt.YOffset("method:N", sort=METHODS),
            color=methods_color(METHODS),
            tooltip=tips,
        )
    )
    noise = (
        alt.Chart()
        .mark_tick(color=INK, thickness=2)
        .encode(x="mean(noise):Q", y=rows, size=alt.value(18))
    )
    return (
        alt.layer(bars, noise, data=chart(frame).data)
        .properties(width=PANEL, height=alt.Step(11))
        .facet(alt.Facet("model:N", header=HEADER, sort=list(frame["model"].unique())), columns=1)
        .resolve_scale(y="independent")
    )


def leads(rows: pd.DataFrame, count: int, norm: str) -> alt.FacetChart:
    some = rows[(rows["variant"] == AS_IT_IS) & rows["detailed"] & (rows["T"] == count)]
    columns = ["model", "part", "rank"]
    frame = some.pivot_table(index=columns, columns="method", values=norm, sort=False)
    frame = (frame["pissa"] - frame["loftq"]).rename("lead").reset_index()
    bound = float(frame["lead"].abs().quantile(0.95)) or 1.0
    present = list(frame["part"].unique())
    order = [part for part in PARTS if part in present] + [p for p in present if p not in PARTS]
    base = alt.Chart().encode(
        x=alt.X("rank:O", title="rank", axis=alt.Axis(labelAngle=0, ticks=False, domain=False)),
        y=alt.Y("part:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False)),
        tooltip=[*(f"{c}:N" for c in columns), alt.Tooltip("lead:Q", format="+.1f")],
    )
    cells = base.mark_rect(stroke="white").encode(
        color=alt.Color(
            "lead:Q", scale=alt.Scale(scheme="pinkyellowgreen", domain=[-bound, bound], clamp=True),
            legend=None,
        )
    )  # fmt: skip
    words = base.mark_text(fontSize=9.5).encode(
        text=alt.Text("lead:Q", format="+.1f"),
        color=alt.condition(f"abs(datum.lead) > {0.6 * bound}", alt.value("white"), alt.value(INK)),
    )
    return (
        alt.layer(cells, words, data=chart(frame).data)
        .properties(width=PANEL + 40, height=alt.Step(24))
        .facet(alt.Facet("model:N", header=HEADER), columns=1)
        .resolve_scale(y="independent", x="independent")
    )


def grids(rows: pd.DataFrame, judged: dict[str, int], count: int) -> alt.FacetChart:
    at_rank = rows["rank"] == rows["model"].map(judged)
    some = rows[at_rank & rows["detailed"] & (rows["T"] == count)]
    columns = ["model", "variant", "method"]
    frame = some.groupby(columns, as_index=False, sort=False)["nuclear"].mean()
    order = list(frame["variant"].unique())
    base = alt.Chart().encode(
        x=alt.X("nuclear:Q", title=REDUCTION),
        y=alt.Y("variant:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False)),
        yOffset=alt.YOffset("method:N", sort=METHODS),
    )
    bars = base.mark_bar().encode(color=methods_color(METHODS))
    words = base.mark_text(align="left", dx=4, color=INK, fontSize=11).encode(
        text=alt.Text("nuclear:Q", format=".1f")
    )
    return (
        alt.layer(bars, words, data=chart(frame).data)
        .properties(width=PANEL - 20, height=alt.Step(15))
        .facet(alt.Facet("model:N", header=HEADER), columns=1)
        .resolve_scale(y="independent")
    )
