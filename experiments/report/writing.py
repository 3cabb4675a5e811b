"""Everything that a report consists of, into one folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import vl_convert

from . import checks, frames, settings, wording
from .gallery import Chart, draw
from .page import render_page
from .runs import Problem
from .specification import VEGA_LITE, file_specification
from .summary import Row, Summarizer
from .sweeps import Sweep
from .tables import latex_table, markdown_table


@dataclass(frozen=True)
class Report:
    """What a caller needs once the files are there."""

    page: Path
    heading: str
    metric: str
    rows: list[Row]
    problems: list[Problem]
    warnings: list[str]


def write_report(sweep: Sweep, output: Path, progress: Callable[[str], None] = print) -> Report:
    """Write page, pictures, tables and Parquet files of `sweep` into `output`.

    Args:
        sweep: what `load_sweeps` found.
        output: the folder to write to; made if it does not exist.
        progress: told what is being done, at the start of each step.

    Raises:
        ValueError: no run is finished, so there is nothing to report.
    """
    if not sweep.runs:
        reasons = "".join(f"\n  {p.run}: {p.reason}" for p in sweep.problems)
        raise ValueError(f"no finished run in '{sweep.name}'{reasons}")
    output.mkdir(parents=True, exist_ok=True)

    progress("intervals")
    runs = sorted(sweep.runs, key=lambda run: (run.method, run.seed, run.run_id))
    arms = settings.arms_of(runs)
    summarizer = Summarizer(runs, arms)
    rows = summarizer.rows()

    progress("tables")
    run_table = frames.runs_frame(runs, arms)
    layer_table = frames.layers_frame(runs, arms)
    metric_table = frames.metrics_frame(runs, arms)
    for name, frame in (("runs", run_table), ("layers", layer_table), ("metrics", metric_table)):
        frame.to_parquet(output / f"{name}.parquet", index=False)
    majority = common(run_table["majority"])
    metric = wording.listing([str(m).replace("_", " ") for m in run_table["metric"].unique()])
    heading = wording.heading(runs, sweep.heading)
    problems = sweep.problems + summarizer.problems + checks.shared_seeds(run_table)
    warnings = [
        *checks.setting_warnings(settings.differences(runs)),
        *checks.baseline_warnings(rows, majority),
        *checks.empty_columns(run_table, layer_table, metric_table),
    ]
    notes = [f"{note} ({who})" for note, who in wording.notes(runs)]
    notes += [f"left out: {p.run}: {p.reason}" for p in problems if p.fatal]
    for name, table in (("table.md", markdown_table), ("table.tex", latex_table)):
        (output / name).write_text(table(rows, metric, heading, notes), encoding="utf-8")

    charts = draw(runs, summarizer, run_table, layer_table, metric_table, majority, metric)
    for chart in charts:
        progress(f"chart: {chart.title}")
        export(chart, output)
    progress("page")
    page = output / "index.html"
    html = render_page(
        sweep=sweep, heading=heading, metric=metric, rows=rows, runs=runs, charts=charts,
        problems=problems, warnings=warnings, majority=majority, summarizer=summarizer,
        output=output,
    )  # fmt: skip
    page.write_text(html, encoding="utf-8")
    return Report(page, heading, metric, rows, problems, warnings)


def export(chart: Chart, output: Path) -> None:
    """The chart as SVG, and as PNG at twice the size, from one specification."""
    svg = vl_convert.vegalite_to_svg(
        file_specification(chart.drawing, chart.title), vl_version=VEGA_LITE
    )
    (output / f"{chart.name}.svg").write_text(svg, encoding="utf-8")
    (output / f"{chart.name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=2))


def common(values: pd.Series) -> float | None:
    """The one value that all runs agree on, if they do."""
    known = values.dropna().unique()
    return float(known[0]) if len(known) == 1 else None
