"""The picture of all ratios: a dot with its interval a row, a tick where the target stands."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from experiments.benchmark.rows import Row
from experiments.report.canvas import INK, SOFT, inline, log_ticks
from experiments.report.gallery import Chart

ROW_HEIGHT = 24
COLORS = {"met": "#009e73", "open": "#e69f00", "missed": "#d55e00", "no target": "#0072b2"}


def ratio_chart(rows: Sequence[Row], title: str) -> Chart | None:
    """The chart of the rows that have a ratio, or None if there is none."""
    table = frame(rows)
    if table.empty:
        return None
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
    caption = "Dots: medians. Bars: 95 % intervals. Black ticks: targets. Logarithmic axis."
    return Chart("ratios", title, caption, drawing.properties(height=ROW_HEIGHT * len(labels)))


def round_ticks(values: pd.Series) -> list[float]:
    """The report's ticks, or finer ones where a decade has too few."""
    if values.max() / values.min() > 4:
        return log_ticks(values)
    return [0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4]


def frame(rows: Sequence[Row]) -> pd.DataFrame:
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
        if row.ratio is not None
    )
