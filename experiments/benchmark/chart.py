"""The pictures: the seconds of every initialization, and the ratios of the other sections.

Each is a Vega-Lite specification, for a page and for files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from experiments.benchmark.rows import Row
from experiments.report.canvas import INK, SOFT, inline, log_ticks
from experiments.report.specification import file_specification

ROW_HEIGHT = 24
PANEL_ROW, PANEL_WIDTH, PANEL_COLUMNS = 19, 330, 2
COLORS = {"met": "#009e73", "open": "#e69f00", "missed": "#d55e00", "no target": "#0072b2"}
READABLE = (
    "datum.value >= 1 ? format(datum.value, '~g') + ' s' : datum.value >= 1e-3 ? "
    "format(1e3 * datum.value, '~g') + ' ms' : format(1e6 * datum.value, '~g') + ' µs'"
)
KINDS = {"lora_init": "circle", "PEFT": "diamond", "torch.linalg": "square", "floor": "stroke"}


def charts(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By a file's name, the specifications of the pictures that there is something to show in."""
    started = [row for row in rows if row.section == "initialization" and row.unit == "s"]
    others = [row for row in rows if row.section != "initialization" and row.ratio is not None]
    found = {}
    if any(row.ours is not None for row in started):
        found["initialization"] = seconds_chart(started, "What an initialization takes")
    if others:
        found["ratios"] = ratio_chart(others, "PEFT's cost as a multiple of lora_init's")
    return found


# -- seconds ---------------------------------------------------------------------------------------


def seconds_chart(rows: Sequence[Row], title: str) -> dict[str, Any]:
    """A panel for each model: ours, its peers, its floor, and where the target stands."""
    table = seconds_frame(rows)
    present = [name for name in COLORS if (table["verdict"] == name).any()]
    panels = [
        panel(table[table["model"] == model], model, present)
        for model in dict.fromkeys(row.model for row in rows if row.ours is not None)
    ]
    heading = alt.TitleParams(
        title, anchor="start", offset=18, fontSize=16, subtitleFontSize=12, subtitleColor=SOFT,
        subtitle=[
            "Seconds on a logarithmic axis, medians. Black ticks: what lora_init may take at most, "
            "by its target.",
            "Grey ticks: what bytes and operations need at least. Synthetic: power-law weights.",
        ],
    )  # fmt: skip
    # Rows of panels, not alt.concat with columns: of that a browser shows nothing but the title.
    lines = [
        alt.hconcat(*panels[first : first + PANEL_COLUMNS], spacing=28)
        for first in range(0, len(panels), PANEL_COLUMNS)
    ]
    drawing = alt.vconcat(*lines, spacing=28, title=heading)
    specification = drawing.resolve_scale(color="shared", shape="shared").to_dict()
    specification.pop("$schema", None)
    specification["config"] = file_specification(panels[0], "")["config"]
    return specification


def panel(table: pd.DataFrame, model: str, verdicts: list[str]) -> alt.LayerChart:
    labels = list(dict.fromkeys(table["case"]))
    ends = table["seconds"].dropna()
    domain = [ends.min() / 1.5, ends.max() * 1.5]
    scale = alt.Scale(type="log", domain=domain, nice=False)
    values = [tick for tick in log_ticks(ends) if domain[0] <= tick <= domain[1]]
    ticks = alt.Axis(values=values, labelExpr=READABLE, labelOverlap=True)
    rows = alt.Axis(ticks=False, domain=False, grid=True, labelPadding=8)
    x = alt.X("seconds:Q", title=None, scale=scale, axis=ticks)
    y = alt.Y("case:N", sort=labels, title=None, axis=rows)
    base = alt.Chart(inline(table))
    kinds = list(KINDS)
    shape = alt.Shape(
        "kind:N",
        scale=alt.Scale(domain=kinds[:3], range=[KINDS[kind] for kind in kinds[:3]]),
        legend=alt.Legend(title=None, orient="bottom", direction="horizontal"),
    )
    color = alt.Color(
        "verdict:N",
        scale=alt.Scale(domain=verdicts, range=[COLORS[name] for name in verdicts]),
        legend=alt.Legend(title="target", orient="bottom", direction="horizontal"),
    )
    tooltip = [
        alt.Tooltip("case:N", title="strategy"),
        alt.Tooltip("kind:N", title="whose"),
        alt.Tooltip("seconds:Q", format=".4~g"),
        *(alt.Tooltip(f"{name}:N") for name in ("ratio", "target", "quality", "floors")),
    ]
    drawing = alt.layer(
        base.transform_filter("datum.kind != 'target'")
        .mark_rule(color="#d0d7de", strokeWidth=2)
        .encode(x=alt.X("min(seconds):Q", scale=scale), x2="max(seconds):Q", y=y),
        base.transform_filter("datum.kind == 'floor'")
        .mark_tick(color="#8b949e", thickness=1.5, size=10)
        .encode(x=x, y=y, tooltip=tooltip),
        base.transform_filter("datum.kind == 'target'")
        .mark_tick(color=INK, thickness=2, size=14)
        .encode(x=x, y=y, tooltip=tooltip),
        base.transform_filter("datum.kind == 'PEFT' || datum.kind == 'torch.linalg'")
        .mark_point(size=55, opacity=1, fill="white", stroke=INK, strokeWidth=1.3)
        .encode(x=x, y=y, shape=shape, tooltip=tooltip),
        base.transform_filter("datum.kind == 'lora_init'")
        .mark_point(size=75, opacity=1, filled=True)
        .encode(x=x, y=y, shape=shape, color=color, tooltip=tooltip),
    )
    name = alt.TitleParams(model, anchor="start", fontSize=13)
    return drawing.properties(width=PANEL_WIDTH, height=PANEL_ROW * len(labels), title=name)


def seconds_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One line for each mark."""
    lines = []
    for row in rows:
        allowed = None
        if row.target is not None and row.ratio is not None:
            allowed = row.ours * row.ratio.estimate / row.target
        marks = {
            "lora_init": row.ours,
            "PEFT": row.peft,
            "torch.linalg": row.exact,
            "floor": row.figures.get("floor, s"),
            "target": allowed,
        }
        told = {
            "model": row.model,
            "case": row.case,
            "verdict": row.verdict or "no target",
            "ratio": "" if row.ratio is None else f"{row.ratio.estimate:.3g} against {row.peer}",
            "target": "" if row.target is None else f"≥ {row.target:g}",
            "quality": "; ".join(
                f"{name} {q.ours:.2g}" for name, q in row.quality.items() if q.ours is not None
            ),
            "floors": f"{row.figures['floors']:.3g}" if row.figures.get("floors") else "",
        }
        lines += [
            told | {"kind": kind, "seconds": seconds}
            for kind, seconds in marks.items()
            if seconds is not None and seconds > 0  # an axis of powers has no place for others
        ]
    return pd.DataFrame(lines)


# -- ratios ----------------------------------------------------------------------------------------


def ratio_chart(rows: Sequence[Row], title: str) -> dict[str, Any]:
    """A dot with its interval for each row, a tick where the target stands."""
    table = ratio_frame(rows)
    labels = list(dict.fromkeys(table["label"]))
    ends = pd.concat([table[c] for c in ("low", "high", "target")] + [pd.Series([1.0])]).dropna()
    axis = alt.Axis(ticks=False, domain=False, grid=True, labelPadding=10, labelLimit=320)
    y = alt.Y("label:N", sort=labels, title=None, axis=axis)
    scale = alt.Scale(type="log", domain=[ends.min() / 1.08, ends.max() * 1.08], nice=False)
    words = "PEFT / lora_init (right of 1: lora_init takes less)"

    def x(column: str) -> alt.X:
        ticks = alt.Axis(values=round_ticks(ends), format="~g")
        return alt.X(f"{column}:Q", title=words, scale=scale, axis=ticks)

    present = [name for name in COLORS if (table["verdict"] == name).any()]
    color = alt.Color(
        "verdict:N",
        scale=alt.Scale(domain=present, range=[COLORS[name] for name in present]),
        legend=alt.Legend(title="target", orient="bottom"),
    )
    base = alt.Chart(inline(table))
    tooltip = [
        alt.Tooltip("label:N", title="case"),
        *(alt.Tooltip(f"{c}:Q", format=".3f") for c in ("ratio", "low", "high", "target")),
        *(alt.Tooltip(f"{c}:N") for c in ("ours", "peft")),
    ]
    drawing = alt.layer(
        alt.Chart(inline(pd.DataFrame({"ratio": [1.0]})))
        .mark_rule(color=SOFT, strokeDash=[4, 3])
        .encode(x=x("ratio")),
        base.mark_rule(strokeWidth=2.5)
        .encode(x=x("low"), x2="high:Q", y=y, color=color),
        base.transform_filter("isValid(datum.target)")
        .mark_tick(color=INK, thickness=2, size=16)
        .encode(x=x("target"), y=y),
        base.mark_point(filled=True, size=85, opacity=1)
        .encode(x=x("ratio"), y=y, color=color, tooltip=tooltip),
    )  # fmt: skip
    return file_specification(drawing.properties(height=ROW_HEIGHT * len(labels)), title)


def round_ticks(values: pd.Series) -> list[float]:
    """The report's ticks, or finer ones where a decade has too few."""
    if values.max() / values.min() > 4:
        return log_ticks(values)
    return [0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4]


def ratio_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One line a ratio, in the order of the rows."""
    return pd.DataFrame(
        {
            "label": f"{row.section} · {row.model} · {row.case}",
            "ratio": row.ratio.estimate,
            "low": row.ratio.low,
            "high": row.ratio.high,
            "target": row.target,
            "verdict": row.verdict or "no target",
            "ours": f"{row.ours:.4g} {row.unit}",
            "peft": f"{row.peft:.4g} {row.unit}",
        }
        for row in rows
    )
