"""Everything that a report consists of, into one folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from . import checks, facts, settings, wording
from .beside import CHANGE_HEADERS, PEFT_HEADERS, change_rows, peft_rows, plain_markdown
from .canvas import Chart
from .comparison import Comparison, compare
from .gallery import draw
from .gathering import gather
from .page import Page, render
from .peft_results import PeftRow, load_peft_results
from .pictures import Pictures
from .runs import Problem
from .selection import at_equal_update, choose, mark_best, without_repeats
from .summary import Row, Summarizer
from .sweeps import Sweep
from .tables import latex_table, markdown_table
from .views import make_views


@dataclass(frozen=True)
class Report:
    """What a caller needs once the files are there.

    Attributes:
        figures: by name, the path of each chart's PNG, and of the page under "page".
        rows: the chosen settings' rows, of all tasks one after the other.
        reused: runs that had not changed since the last report and were not read again.
    """

    page: Path
    name: str
    heading: str
    metric: str
    rows: list[Row]
    problems: list[Problem]
    warnings: list[str]
    figures: dict[str, Path] = field(default_factory=dict)
    comparison: Comparison | None = None
    reused: int = 0


def write_report(
    sweep: Sweep,
    output: Path,
    progress: Callable[[str], None] = print,
    other: Sweep | None = None,
    peft: Path | None = None,
) -> Report:
    """Write page, pictures, tables and Parquet files of `sweep` into `output`.

    Args:
        sweep: what `load_sweeps` found.
        output: the folder to write to; made if it does not exist.
        progress: told what is being done, at the start of each step.
        other: a sweep of the same settings over another version of the code, to compare with.
        peft: results of PEFT's own method comparison, to show beside these.

    Raises:
        ValueError: no run is finished, so there is nothing to report.
    """
    gathered = gather(sweep, output, progress)
    if gathered.runs.empty:
        reasons = "".join(f"\n  {p.run}: {p.reason}" for p in gathered.problems)
        raise ValueError(f"no finished run in '{sweep.name}'{reasons}")

    progress("choosing settings")
    runs = settings.with_arms(gathered.runs).sort_values(["method", "seed", "run_id"])
    matched = {run for told in sweep.equal_update.values() for run in told.get("runs") or []}
    choices = choose(runs[~runs["run_id"].isin(matched)], sweep.selected)
    if not choices:
        raise ValueError(
            f"'{sweep.name}' has a protocol.json that selected none of its finished runs: run the "
            "sweep's command again to complete it"
        )
    equal = at_equal_update(runs, choices, sweep.equal_update)
    runs = mark_best(without_repeats(runs), choices)
    progress("intervals")
    summarizer = Summarizer(runs, choices)
    rows = summarizer.all_rows()
    equal_rows = Summarizer(runs, equal).all_rows() if equal else []

    majority = {
        task: float(known.iloc[0])
        for task, group in runs.groupby("task")
        if len(known := group["majority"].dropna().drop_duplicates()) == 1
    }
    first = summarizer.tasks[0] if len(summarizer.tasks) == 1 else None
    plain = majority.get(first) if summarizer.quantity == "score" else None
    metric = wording.listing([str(m).replace("_", " ") for m in runs["metric"].unique()])
    if summarizer.quantity == "validation_score":
        metric = f"validation {metric}"
    heading = wording.heading(choices, len(summarizer.seeds), sweep.heading)
    views = make_views(runs, gathered.layers, gathered.metrics, summarizer)
    problems = gathered.problems + summarizer.problems + checks.shared_seeds(runs)
    comparison, beside = None, []
    if other is not None:
        progress("comparing sweeps")
        comparison = compare_with(other, runs, sweep.name, output, problems, progress)
    if peft is not None:
        beside, unread = load_peft_results(peft)
        problems += unread
    warnings = [
        *checks.setting_warnings(settings.differences(runs)),
        *checks.choice_warnings(runs, choices),
        *checks.baseline_warnings(rows, plain),
        *checks.empty_columns(runs, gathered.layers, gathered.metrics),
    ]
    notes = [f"{note} ({who})" for note, who in facts.notes(runs)]
    notes += [f"left out: {p.run}: {p.reason}" for p in problems if p.fatal]
    for name, table in (("table.md", markdown_table), ("table.tex", latex_table)):
        (output / name).write_text(table(rows, metric, heading, notes), encoding="utf-8")
    if equal_rows:
        text = markdown_table(equal_rows, metric, "at equal update size", [])
        (output / "equal_update.md").write_text(text, encoding="utf-8")

    write_extras(comparison, beside, output)
    charts, canvas = draw(summarizer, views, majority, metric)
    figures = export_all(charts, views.tables, output, progress)
    progress("page")
    page = Page(
        sweep=sweep, heading=heading, metric=metric, majority=plain, choices=choices, rows=rows,
        equal_rows=equal_rows,
        runs=runs, charts=charts, canvas=canvas, views=views, problems=problems,
        warnings=warnings, summarizer=summarizer, comparison=comparison, peft=beside,
    )  # fmt: skip
    path = output / "index.html"
    path.write_text(render(page, output), encoding="utf-8")
    return Report(
        path, sweep.name, heading, metric, rows, problems, warnings, {**figures, "page": path},
        comparison, gathered.reused,
    )  # fmt: skip


def compare_with(
    other: Sweep,
    runs: pd.DataFrame,
    name: str,
    output: Path,
    problems: list[Problem],
    progress: Callable[[str], None],
) -> Comparison:
    """Gather the other sweep, whose tables are kept in `output/compared`, and compare."""
    gathered = gather(other, output / "compared", progress)
    if gathered.runs.empty:
        raise ValueError(f"--compare: no finished run in '{other.name}'")
    others = without_repeats(settings.with_arms(gathered.runs))
    return compare(runs, others, (name, other.name), problems)


def write_extras(comparison: Comparison | None, peft: list[PeftRow], output: Path) -> None:
    """The tables of the comparison and of PEFT's results, in Markdown."""
    if comparison is not None:
        title = f"{comparison.name} against {comparison.other}"
        text = plain_markdown(title, CHANGE_HEADERS, change_rows(comparison))
        (output / "comparison.md").write_text(text, encoding="utf-8")
    if peft:
        text = plain_markdown("PEFT's own results", PEFT_HEADERS, peft_rows(peft))
        (output / "peft.md").write_text(text, encoding="utf-8")


def export_all(
    charts: list[Chart],
    tables: dict[str, pd.DataFrame],
    output: Path,
    progress: Callable[[str], None],
) -> dict[str, Path]:
    """Every chart as SVG, PDF and PNG; returns the paths of the PNG files by name."""
    figures = {}
    for chart in charts:
        progress(f"chart: {chart.title}")
        for name in Pictures(chart, tables).write(output):
            figures[name] = output / f"{name}.png"
    return figures
