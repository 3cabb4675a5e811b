"""Everything that a report consists of, written into one folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from . import arms, checks, comparison, facts
from .archive import gather
from .cells import listing
from .choices import at_equal_update, choose, mark_best, with_kept_runs, without_repeats
from .contents import Report
from .gallery import draw
from .headline import headline
from .matrix import Matrix, make_matrix
from .page import render
from .peft_results import load_peft_results, peft_table
from .power import powers
from .quantities import SCORE
from .specification import write_pictures
from .summary import Summarizer
from .sweeps import Sweep
from .views import make_views


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
        output: the folder to write to; created if it does not exist.
        progress: called with the name of each step at its start.
        other: a sweep of the same settings with another version of the code, to compare with.
        peft: results of PEFT's own method comparison, to show next to these.
        alone: a file for a second page without links to other files.

    Raises:
        ValueError: no run is finished, so that there is nothing to report.
    """
    report = make_report(sweep, output, progress)
    if other is not None:
        progress("comparing sweeps")
        theirs = gather(other, output / "compared", progress)
        if theirs.runs.empty:
            raise ValueError(f"--compare: no finished run in '{other.name}'")
        others = without_repeats(arms.with_arms(theirs.runs))
        names = (sweep.name, other.name)
        found = comparison.compare(report.runs, others, names, report.problems)
        report = replace(report, comparison=found)
    if peft is not None:
        peers, unread = load_peft_results(peft)
        report.problems.extend(unread)
        report = replace(report, peft=peft_table(peers))
    write_tables(report)
    for chart in report.charts:
        progress(f"chart: {chart.title}")
        names = write_pictures(chart, report.canvas, report.views.tables, output)
        report.figures.update({name: output / f"{name}.png" for name in names})
    progress("page")
    report.page.write_text(render(report, output), encoding="utf-8")
    report.figures["page"] = report.page
    if alone is not None:
        alone.parent.mkdir(parents=True, exist_ok=True)
        alone.write_text(render(report, None), encoding="utf-8")
    return report


def make_report(sweep: Sweep, output: Path, progress: Callable[[str], None]) -> Report:
    """Read the runs of `sweep`, and compute everything that the report says about them."""
    gathered = gather(sweep, output, progress)
    if gathered.runs.empty:
        reasons = "".join(f"\n  {p.run}: {p.reason}" for p in gathered.problems)
        raise ValueError(f"no finished run in '{sweep.name}'{reasons}")
    progress("intervals")
    runs, summarizer, equal = choose_settings(sweep, gathered.runs)
    rows, matrix = summarizer.all_rows(), make_matrix(summarizer, gathered.metrics)
    found = powers(matrix, summarizer)
    tested = summarizer.quantity == "score"
    majority = majorities(runs) if tested else {}
    only = majority.get(summarizer.tasks[0]) if len(summarizer.tasks) == 1 else None
    metric = listing(str(m).replace("_", " ") for m in runs["metric"].unique())
    metric = metric if tested else f"validation {metric}"
    views = make_views(runs, gathered.layers, gathered.metrics, summarizer, matrix, found)
    charts, canvas = draw(summarizer, views, majority, metric, checks.diverged(sweep))
    return Report(
        folder=output,
        sweep=sweep,
        headline=headline(matrix, found, metric),
        metric=metric,
        rows=rows,
        matrix=matrix,
        powers=found,
        equal_rows=equal.all_rows() if equal else [],
        equal_matrix=make_matrix(equal, gathered.metrics, (SCORE,)) if equal else Matrix([]),
        runs=runs,
        charts=charts,
        canvas=canvas,
        views=views,
        problems=gathered.problems + summarizer.problems + checks.shared_seeds(runs),
        warnings=[
            *checks.setting_warnings(arms.differences(runs)),
            *checks.choice_warnings(runs, summarizer.choices),
            *checks.baseline_warnings(rows, only),
        ],
        summarizer=summarizer,
        reused=gathered.reused,
    )


def choose_settings(
    sweep: Sweep, runs: pd.DataFrame
) -> tuple[pd.DataFrame, Summarizer, Summarizer | None]:
    """The runs with their arms and choices, their summary, and the one at equal update size."""
    runs = arms.with_arms(runs).sort_values(["method", "seed", "run_id"])
    choices = choose(runs[~runs["run_id"].isin(only_matched(sweep))], sweep.selected)
    if not choices:
        raise ValueError(
            f"'{sweep.name}' has a protocol.json that selected none of its finished runs: run the "
            "sweep's command again to complete it"
        )
    equal = at_equal_update(runs, choices, sweep.equal_update)
    equal = Summarizer(runs, equal) if equal else None
    runs = mark_best(without_repeats(runs), choices)
    choices = [with_kept_runs(choice, runs) for choice in choices]
    return runs, Summarizer(runs, choices), equal


def majorities(runs: pd.DataFrame) -> dict[str, float]:
    """The majority class's score by task, if all runs of the task agree on it."""
    known = {task: group["majority"].dropna().unique() for task, group in runs.groupby("task")}
    return {task: float(values[0]) for task, values in known.items() if len(values) == 1}


def only_matched(sweep: Sweep) -> set[str]:
    """Runs that were made only to match the update size. No learning rate is chosen among them."""
    matched, selected = (
        {run for one in part.values() for run in one.get("runs") or []}
        for part in (sweep.equal_update, sweep.selected)
    )
    return matched - selected


def write_tables(report: Report) -> None:
    """Write every table of the page as Markdown, and the results and the matrix as LaTeX too."""
    notes = [f"{note} ({methods})" for note, methods in facts.notes(report.runs)]
    notes += [f"left out: {p.run}: {p.reason}" for p in report.problems if p.fatal]
    shown = report.tables()
    *compared, results = shown
    results = replace(results, title=f"{report.name}. ±: half of the 95 % interval")
    caption = " ".join(report.headline).rstrip(".")
    parts = [
        lines(report.headline),
        *(table.markdown() for table in (*shown, *report.power_tables)),
        lines(notes),
    ]
    texts = {
        "table.md": "\n".join(filter(None, parts)),
        "table.tex": "\n".join([
            r"% needs \usepackage{booktabs}",
            *(f"% {line}" for line in (*report.headline, *notes)),
            *(replace(table, title=caption).latex() for table in compared),
            results.latex(),
        ]),
    }  # fmt: skip
    if report.equal_rows:
        texts["equal_update.md"] = "\n".join(table.markdown() for table in report.equal_tables())
    if report.comparison is not None:
        texts["comparison.md"] = report.comparison.table.markdown()
    if report.peft is not None:
        texts["peft.md"] = report.peft.markdown()
    for name, text in texts.items():
        (report.folder / name).write_text(text, encoding="utf-8")


def lines(texts: Iterable[str]) -> str:
    """A list in Markdown."""
    return "".join(f"- {text}\n" for text in texts)
