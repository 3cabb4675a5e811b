"""The page: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import caveats, comparison, facts, matrix_table, peft_results
from .canvas import Canvas, Chart
from .matrix import Matrix
from .palette import BASELINE
from .power import Power
from .result_table import columns as table_columns
from .runs import Problem
from .specification import VEGA_LITE, columns, page_specification
from .summary import Row, Summarizer
from .sweeps import Sweep
from .views import Views

HERE = Path(__file__).parent
# SVG is sharper, but slow for many marks.
CANVAS_ABOVE = 20_000
LISTED = 200  # rows of a table without a filter; the Markdown file has all


@dataclass(frozen=True)
class Page:
    """Everything that the page shows."""

    sweep: Sweep
    headline: tuple[str, str, str]
    metric: str
    rows: list[Row]
    matrix: Matrix
    powers: list[Power]
    equal_rows: list[Row]
    equal_matrix: Matrix
    runs: pd.DataFrame
    charts: list[Chart]
    canvas: Canvas
    views: Views
    problems: list[Problem]
    warnings: list[str]
    summarizer: Summarizer
    comparison: comparison.Comparison | None
    peft: list[peft_results.PeftRow]

    @cached_property
    def specifications(self) -> dict[str, dict]:
        """The charts as JSON, which both pages share."""
        return {chart.name: page_specification(chart.drawing) for chart in self.charts}


def render(page: Page, output: Path | None) -> str:
    """The HTML of the whole report.

    Args:
        output: the folder of the page and its pictures; links to run folders are relative to it.
            None for a page without links.
    """
    choices, boots = page.summarizer.choices, page.summarizer.bootstraps
    examples = [bootstrap.examples for bootstrap in boots.values()]
    only = int(examples[0]) if len(examples) == 1 else None
    changes = page.comparison.changes if page.comparison else []
    return environment().get_template("template.html.j2").render(
        headline=page.headline,
        alone=output is None,
        subtitle=caveats.ONE_RATE if caveats.one_learning_rate(choices) else page.sweep.heading,
        name=page.sweep.name,
        baseline=BASELINE,
        matrix=matrix_view(page.rows, page.matrix, page.metric),
        equal_matrix=matrix_view(page.equal_rows, page.equal_matrix, page.metric),
        legend=matrix_table.legend(page.matrix),
        power_tables=matrix_table.power_tables(page.powers, page.metric),
        chosen=caveats.how_chosen(choices),
        caveats=caveats.caveats(page.rows, page.matrix, len(page.summarizer.seeds), only),
        facts=facts.facts(page.runs),
        notes=facts.notes(page.runs),
        failed=[p for p in page.problems if p.fatal],
        gaps=[p for p in page.problems if not p.fatal],
        warnings=page.warnings,
        marks=page.canvas.marks,
        filters=page.canvas.filters,
        initial=page.canvas.initial,
        sections=[(name, list(some)) for name, some in groupby(page.charts, lambda c: c.section)],
        columns=table_columns(page.metric, page.rows),
        rows=page.rows,
        equal_columns=table_columns(page.metric, page.equal_rows),
        equal_rows=page.equal_rows,
        several_tasks=len(page.summarizer.tasks) > 1,
        several_rates=not caveats.one_learning_rate(choices),
        metric=page.metric,
        finished=len(page.runs),
        comparison=page.comparison,
        change_headers=comparison.HEADERS,
        changes=[change.cells() for change in changes[:LISTED]],
        peft_headers=peft_results.HEADERS,
        peft=[row.cells() for row in page.peft[:LISTED]],
        data=as_script(script_data(page, output)),
        libraries=Markup(bundle()),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
    )  # fmt: skip


def matrix_view(
    rows: list[Row], matrix: Matrix, metric: str
) -> tuple[list[str], list[tuple[Row, list[matrix_table.Cell]]]] | None:
    """The headings and the cells of each row; None if nothing is compared."""
    if not matrix.judgements:
        return None
    cells = [(row, matrix_table.cells_of(row, matrix)) for row in rows]
    return matrix_table.headers(matrix, metric), cells


def script_data(page: Page, output: Path | None) -> dict[str, Any]:
    """The data of the page's script: charts without data, each table once, and the filters."""
    tables = {name: table for name, table in page.views.tables.items() if len(table)}
    # Spectra are drawn for one layer at a time.
    marks = sum(len(table) for name, table in tables.items() if name != "spectra")
    return {
        "specifications": page.specifications,
        "tables": {name: columns(table) for name, table in tables.items()},
        "filters": page.canvas.filters,
        "initial": page.canvas.initial,
        "folders": None if output is None else folders(page.runs, output),
        "colors": {method: mark.color for method, mark in page.canvas.marks.items()},
        "renderer": "canvas" if marks > CANVAS_ABOVE else "svg",
    }


def folders(runs: pd.DataFrame, output: Path) -> dict[str, Any]:
    """The folders of the runs relative to the page, each parent folder once."""
    parents = [os.path.dirname(folder) for folder in runs["folder"]]
    distinct, here = list(dict.fromkeys(parents)), output.resolve()
    return {
        "starts": [quote(relative(os.path.realpath(parent), here)) for parent in distinct],
        "start": [distinct.index(parent) for parent in parents],
        "names": [os.path.basename(folder) for folder in runs["folder"]],
    }


def relative(path: str, start: Path) -> str:
    """`path` relative to `start`; absolute on another drive."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return os.path.abspath(path)


@cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that cannot end its own element."""
    return vl_convert.javascript_bundle(vl_version=VEGA_LITE).replace("</script", "<\\/script")


def environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=keep_units,
    )  # fmt: skip


def keep_units(value: Any) -> Any:
    """Prevent a line break between a number and its percent sign."""
    return value.replace(" %", "\u00a0%") if type(value) is str else value


def as_script(data: dict[str, Any]) -> Markup:
    """JSON that is safe inside a script element, whatever names it contains."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))
