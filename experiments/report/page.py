"""The page: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import json
import os
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import caveats, facts
from .contents import Report
from .matrix import Matrix
from .matrix_table import Cell, cells_of, headers, legend
from .palette import BASELINE
from .result_table import columns as table_columns
from .specification import VEGA_LITE, columns
from .summary import Row

HERE = Path(__file__).parent
# SVG is sharper, but slow for many marks.
CANVAS_ABOVE = 20_000
LISTED = 200  # rows of a table without a filter; the Markdown file has all


def render(report: Report, output: Path | None) -> str:
    """The HTML of the whole report.

    Args:
        output: the folder of the page and its pictures; links to run folders are relative to it.
            None for a page without links.
    """
    choices, boots = report.summarizer.choices, report.summarizer.bootstraps
    examples = [bootstrap.examples for bootstrap in boots.values()]
    only = int(examples[0]) if len(examples) == 1 else None
    return environment().get_template("template.html.j2").render(
        report=report,
        alone=output is None,
        baseline=BASELINE,
        matrix=matrix_view(report.rows, report.matrix, report.metric),
        equal_matrix=matrix_view(report.equal_rows, report.equal_matrix, report.metric),
        legend=legend(report.matrix),
        one_rate=caveats.ONE_RATE if caveats.one_learning_rate(choices) else None,
        chosen=caveats.how_chosen(choices),
        caveats=caveats.caveats(
            report.rows, report.matrix, len(report.summarizer.seeds), only
        ),
        facts=facts.facts(report.runs),
        notes=facts.notes(report.runs),
        failed=[p for p in report.problems if p.fatal],
        gaps=[p for p in report.problems if not p.fatal],
        marks=report.canvas.marks,
        filters=report.canvas.filters,
        initial=report.canvas.initial,
        sections=[(name, list(some)) for name, some in groupby(report.charts, lambda c: c.section)],
        columns=table_columns(report.metric, report.rows),
        equal_columns=table_columns(report.metric, report.equal_rows),
        several_tasks=len(report.summarizer.tasks) > 1,
        listed=LISTED,
        data=as_script(script_data(report, output)),
        libraries=Markup(bundle()),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
    )  # fmt: skip


def matrix_view(
    rows: list[Row], matrix: Matrix, metric: str
) -> tuple[list[str], list[tuple[Row, list[Cell]]]] | None:
    """The headings and the cells of each row; None if nothing is compared."""
    if not matrix.judgements:
        return None
    return headers(matrix, metric), [(row, cells_of(row, matrix)) for row in rows]


def script_data(report: Report, output: Path | None) -> dict[str, Any]:
    """The data of the page's script: charts without data, each table once, and the filters."""
    tables = {name: table for name, table in report.views.tables.items() if len(table)}
    # Spectra are drawn for one layer at a time.
    marks = sum(len(table) for name, table in tables.items() if name != "spectra")
    return {
        "specifications": report.specifications,
        "tables": {name: columns(table) for name, table in tables.items()},
        "filters": report.canvas.filters,
        "initial": report.canvas.initial,
        "folders": None if output is None else folders(report.runs, output),
        "colors": {method: mark.color for method, mark in report.canvas.marks.items()},
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
