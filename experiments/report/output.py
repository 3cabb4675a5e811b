"""Everything that a report consists of, written into one folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from . import arms, checks, comparison, facts, matrix_table, peft_results
from .archive import gather
from .cells import listing, markdown
from .choices import at_equal_update, choose, mark_best, with_kept_runs, without_repeats
from .gallery import draw
from .headline import headline
from .matrix import Matrix, make_matrix
from .page import Page, render
from .pictures import write_pictures
from .power import powers
from .quantities import SCORE
from .result_table import latex_results, latex_table, markdown_table
from .runs import Problem
from .summary import Row, Summarizer
from .sweeps import Sweep
from .views import make_views


@dataclass(frozen=True)
class Report:
    """The files of a report, and what it found.

    Attributes:
        headline: what differs, what does not, and what could not be seen.
        matrix: every quantity of every arm, compared with the baseline.
        figures: by name, the path of each chart's PNG, and of the page under "page".
        rows: the rows of the chosen settings, one task after the other.
        reused: the number of unchanged runs, which were not read again.
    """

    page: Path
    name: str
    headline: tuple[str, str, str]
    metric: str
    rows: list[Row]
    matrix: Matrix
    problems: list[Problem]
    warnings: list[str]
    figures: dict[str, Path] = field(default_factory=dict)
    comparison: comparison.Comparison | None = None
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
        output: the folder to write to; created if it does not exist.
        progress: called with the name of each step at its start.
        other: a sweep of the same settings with another version of the code, to compare with.
        peft: results of PEFT's own method comparison, to show next to these.
        alone: a file for a second page without links to other files.

    Raises:
        ValueError: no run is finished, so that there is nothing to report.
    """
    gathered = gather(sweep, output, progress)
    if gathered.runs.empty:
        reasons = "".join(f"\n  {p.run}: {p.reason}" for p in gathered.problems)
        raise ValueError(f"no finished run in '{sweep.name}'{reasons}")
    progress("intervals")
    runs, summarizer, equal = choose_settings(sweep, gathered.runs)
    choices, rows = summarizer.choices, summarizer.all_rows()
    matrix = make_matrix(summarizer, gathered.metrics)
    found = powers(matrix, summarizer)
    tested = summarizer.quantity == "score"
    majority = majorities(runs) if tested else {}
    only = majority.get(summarizer.tasks[0]) if len(summarizer.tasks) == 1 else None
    metric = listing(str(m).replace("_", " ") for m in runs["metric"].unique())
    metric = metric if tested else f"validation {metric}"
    views = make_views(runs, gathered.layers, gathered.metrics, summarizer, matrix, found)
    problems = gathered.problems + summarizer.problems + checks.shared_seeds(runs)
    compared, peers = None, []
    if other is not None:
        progress("comparing sweeps")
        theirs = gather(other, output / "compared", progress)
        if theirs.runs.empty:
            raise ValueError(f"--compare: no finished run in '{other.name}'")
        others = without_repeats(arms.with_arms(theirs.runs))
        compared = comparison.compare(runs, others, (sweep.name, other.name), problems)
    if peft is not None:
        peers, unread = peft_results.load_peft_results(peft)
        problems += unread
    warnings = [
        *checks.setting_warnings(arms.differences(runs)),
        *checks.choice_warnings(runs, choices),
        *checks.baseline_warnings(rows, only),
        *checks.empty_columns(runs, gathered.layers, gathered.metrics),
        *checks.equal_scores(runs),
    ]
    charts, canvas = draw(summarizer, views, majority, metric, checks.diverged(sweep))
    page = Page(
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
        problems=problems,
        warnings=warnings,
        summarizer=summarizer,
        comparison=compared,
        peft=peers,
    )
    write_tables(page, output)
    figures = {}
    for chart in charts:
        progress(f"chart: {chart.title}")
        names = write_pictures(chart, canvas, views.tables, output)
        figures |= {name: output / f"{name}.png" for name in names}
    progress("page")
    path = output / "index.html"
    path.write_text(render(page, output), encoding="utf-8")
    if alone is not None:
        alone.parent.mkdir(parents=True, exist_ok=True)
        alone.write_text(render(page, None), encoding="utf-8")
    return Report(
        path, sweep.name, page.headline, metric, rows, matrix, problems, warnings,
        {**figures, "page": path}, compared, gathered.reused,
    )  # fmt: skip


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


def write_tables(page: Page, output: Path) -> None:
    """Write every table of the page as Markdown, and the results and the matrix as LaTeX too."""
    notes = [f"{note} ({methods})" for note, methods in facts.notes(page.runs)]
    notes += [f"left out: {p.run}: {p.reason}" for p in page.problems if p.fatal]
    headers = matrix_table.headers(page.matrix, page.metric)
    verdicts = matrix_table.matrix_rows(page.rows, page.matrix) if page.matrix.judgements else []
    parts = ["".join(f"- {sentence}\n" for sentence in page.headline)]
    if verdicts:
        parts += [
            markdown("Compared with the baseline", headers, verdicts),
            f"{matrix_table.legend(page.matrix)}\n",
        ]
    parts.append(markdown_table(page.rows, page.metric, "Results"))
    for title, head, cells in matrix_table.power_tables(page.powers, page.metric):
        parts.append(markdown(title, head, cells, "---:"))
    parts.append("".join(f"- {note}\n" for note in notes))
    texts = {
        "table.md": "\n".join(filter(None, parts)),
        "table.tex": "\n".join([
            r"% needs \usepackage{booktabs}",
            *(f"% {line}" for line in (*page.headline, *notes)),
            *([latex_table(" ".join(page.headline).rstrip("."), headers, verdicts)]
              if verdicts else []),
            latex_results(page.rows, page.metric, page.sweep.name),
        ]),
    }  # fmt: skip
    if page.equal_rows:
        title = "At equal update size"
        cells = matrix_table.matrix_rows(page.equal_rows, page.equal_matrix)
        texts["equal_update.md"] = "\n".join([
            markdown(title, matrix_table.headers(page.equal_matrix, page.metric), cells),
            markdown_table(page.equal_rows, page.metric, title),
        ])  # fmt: skip
    if page.comparison is not None:
        title = f"{page.comparison.name} against {page.comparison.other}"
        cells = [change.cells() for change in page.comparison.changes]
        texts["comparison.md"] = markdown(title, comparison.HEADERS, cells)
    if page.peft:
        cells = [row.cells() for row in page.peft]
        texts["peft.md"] = markdown("PEFT's own results", peft_results.HEADERS, cells)
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
