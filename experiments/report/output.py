"""Everything that a report consists of, into one folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from . import arms as settings
from . import checks, facts
from . import findings as wording
from .archive import gather
from .beside import CHANGE_HEADERS, PEFT_HEADERS, change_rows, peft_rows, plain_markdown
from .canvas import Canvas, Chart
from .choices import at_equal_update, choose, mark_best, with_kept_runs, without_repeats
from .comparison import Comparison, compare
from .divergence import diverged
from .gallery import draw
from .page import Page, render
from .peft_results import load_peft_results
from .pictures import Pictures
from .result_table import latex_table, markdown_table
from .runs import Problem
from .summary import Row, Summarizer
from .sweeps import Sweep
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
    alone: Path | None = None,
) -> Report:
    """Write page, pictures, tables and Parquet files of `sweep` into `output`.

    Args:
        sweep: what `load_sweeps` found.
        output: the folder to write to; made if it does not exist.
        progress: told what is being done, at the start of each step.
        other: a sweep of the same settings over another version of the code, to compare with.
        peft: results of PEFT's own method comparison, to show beside these.
        alone: a file for the page once more, without links to what lies beside it.

    Raises:
        ValueError: no run is finished, so there is nothing to report.
    """
    gathered = gather(sweep, output, progress)
    if gathered.runs.empty:
        reasons = "".join(f"\n  {p.run}: {p.reason}" for p in gathered.problems)
        raise ValueError(f"no finished run in '{sweep.name}'{reasons}")
    progress("intervals")
    runs, summarizer, equal_rows = judge(sweep, gathered.runs)
    choices, rows = summarizer.choices, summarizer.all_rows()
    majority = majorities(runs) if summarizer.quantity == "score" else {}
    only = majority.get(summarizer.tasks[0]) if len(summarizer.tasks) == 1 else None
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
        *checks.baseline_warnings(rows, only),
        *checks.empty_columns(runs, gathered.layers, gathered.metrics),
        *checks.equal_scores(runs),
    ]
    charts, canvas = draw(summarizer, views, majority, metric, diverged(sweep))
    page = Page(
        sweep=sweep, heading=heading, metric=metric, majority=only, choices=choices, rows=rows,
        equal_rows=equal_rows, runs=runs, charts=charts, canvas=canvas, views=views,
        problems=problems, warnings=warnings, summarizer=summarizer, comparison=comparison,
        peft=beside,
    )  # fmt: skip
    write_tables(page, output)
    figures = export_all(charts, canvas, views.tables, output, progress)
    progress("page")
    path = output / "index.html"
    path.write_text(render(page, output), encoding="utf-8")
    if alone is not None:
        alone.parent.mkdir(parents=True, exist_ok=True)
        alone.write_text(render(page, None), encoding="utf-8")
    return Report(
        path, sweep.name, heading, metric, rows, problems, warnings, {**figures, "page": path},
        comparison, gathered.reused,
    )  # fmt: skip


def judge(sweep: Sweep, runs: pd.DataFrame) -> tuple[pd.DataFrame, Summarizer, list[Row]]:
    """The runs with their arms and choices marked, what sums them up, and the rows at equal update
    size."""
    runs = settings.with_arms(runs).sort_values(["method", "seed", "run_id"])
    choices = choose(runs[~runs["run_id"].isin(only_matched(sweep))], sweep.selected)
    if not choices:
        raise ValueError(
            f"'{sweep.name}' has a protocol.json that selected none of its finished runs: run the "
            "sweep's command again to complete it"
        )
    equal = at_equal_update(runs, choices, sweep.equal_update)
    equal_rows = Summarizer(runs, equal).all_rows() if equal else []
    runs = mark_best(without_repeats(runs), choices)
    choices = [with_kept_runs(choice, runs) for choice in choices]
    return runs, Summarizer(runs, choices), equal_rows


def majorities(runs: pd.DataFrame) -> dict[str, float]:
    """By task, the score of always answering the majority class, if all runs agree on it."""
    found = {}
    for task, group in runs.groupby("task"):
        known = group["majority"].dropna().unique()
        if len(known) == 1:
            found[task] = float(known[0])
    return found


def only_matched(sweep: Sweep) -> set[str]:
    """Runs made for equal update size alone: no part of what a learning rate was chosen among."""
    ids = [
        {run for told in part.values() for run in told.get("runs") or []}
        for part in (sweep.equal_update, sweep.selected)
    ]
    return ids[0] - ids[1]


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


def write_tables(page: Page, output: Path) -> None:
    """Every table of the page as Markdown, and that of the results in LaTeX too."""
    notes = [f"{note} ({who})" for note, who in facts.notes(page.runs)]
    notes += [f"left out: {p.run}: {p.reason}" for p in page.problems if p.fatal]
    texts = {
        "table.md": markdown_table(page.rows, page.metric, page.heading, notes),
        "table.tex": latex_table(page.rows, page.metric, page.heading, notes),
    }
    if page.equal_rows:
        heading = "at equal update size"
        texts["equal_update.md"] = markdown_table(page.equal_rows, page.metric, heading, [])
    if page.comparison is not None:
        title = f"{page.comparison.name} against {page.comparison.other}"
        texts["comparison.md"] = plain_markdown(title, CHANGE_HEADERS, change_rows(page.comparison))
    if page.peft:
        texts["peft.md"] = plain_markdown("PEFT's own results", PEFT_HEADERS, peft_rows(page.peft))
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")


def export_all(
    charts: list[Chart],
    canvas: Canvas,
    tables: dict[str, pd.DataFrame],
    output: Path,
    progress: Callable[[str], None],
) -> dict[str, Path]:
    """Every chart as SVG, PDF and PNG; returns the paths of the PNG files by name."""
    figures = {}
    for chart in charts:
        progress(f"chart: {chart.title}")
        for name in Pictures(chart, canvas, tables).write(output):
            figures[name] = output / f"{name}.png"
    return figures
