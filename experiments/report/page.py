"""The self-contained page: one HTML file that loads nothing and talks to nobody."""

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

from . import facts
from . import findings as wording
from .beside import CHANGE_HEADERS, PEFT_HEADERS, change_rows, peft_rows
from .canvas import Canvas, Chart
from .choices import Choice
from .comparison import Comparison
from .peft_results import PeftRow
from .result_table import columns as table_columns
from .runs import Problem
from .specification import VEGA_LITE, columns, page_specification
from .summary import Row, Summarizer
from .sweeps import Sweep
from .views import Views

HERE = Path(__file__).parent
# Many marks are slow as SVG elements; few are sharper.
CANVAS_ABOVE = 20_000
LISTED = 200  # rows of a table without a filter; the Markdown file beside the page has all


@dataclass(frozen=True)
class Page:
    """Everything that the page shows."""

    sweep: Sweep
    heading: str
    metric: str
    majority: float | None
    choices: list[Choice]
    rows: list[Row]
    equal_rows: list[Row]
    runs: pd.DataFrame
    charts: list[Chart]
    canvas: Canvas
    views: Views
    problems: list[Problem]
    warnings: list[str]
    summarizer: Summarizer
    comparison: Comparison | None
    peft: list[PeftRow]

    @cached_property
    def specifications(self) -> dict[str, dict]:
        """The charts' JSON, for the page and for the one that is handed on."""
        return {chart.name: page_specification(chart.drawing) for chart in self.charts}


def render(page: Page, output: Path | None) -> str:
    """HTML of the whole report.

    Args:
        output: the folder that the page lies in, with the pictures; links to run folders are
            relative to it. None for a page that is handed on alone, without links.
    """
    sweep, canvas, boots = page.sweep, page.canvas, page.summarizer.bootstraps
    examples = [bootstrap.examples for bootstrap in boots.values()]
    failed = [p for p in page.problems if p.fatal]
    several = len(page.summarizer.tasks) > 1
    return environment().get_template("template.html.j2").render(
        heading=page.heading,
        alone=output is None,
        subtitle=sweep.heading if sweep.heading and sweep.heading != page.heading else None,
        name=sweep.name,
        findings=wording.findings_by_task(page.rows, page.majority),
        chosen=wording.how_chosen(page.choices),
        rate_caveat=wording.rate_caveat(page.choices),
        caveats=wording.caveats(
            page.rows, page.summarizer.seeds, int(examples[0]) if len(examples) == 1 else None
        ),
        facts=facts.facts(page.runs),
        notes=facts.notes(page.runs),
        failed=failed,
        gaps=[p for p in page.problems if not p.fatal],
        warnings=page.warnings,
        marks=canvas.marks,
        filters=canvas.filters,
        initial=canvas.initial,
        sections=[(name, list(some)) for name, some in groupby(page.charts, lambda c: c.section)],
        columns=table_columns(page.metric, page.rows),
        rows=page.rows,
        equal_columns=table_columns(page.metric, page.equal_rows),
        equal_rows=page.equal_rows,
        several_tasks=several,
        several_rates=not wording.one_learning_rate(page.choices),
        metric=page.metric,
        finished=len(page.runs),
        comparison=page.comparison,
        compared=wording.compared(page.comparison) if page.comparison else None,
        change_headers=CHANGE_HEADERS,
        changes=change_rows(page.comparison)[:LISTED] if page.comparison else [],
        peft_headers=PEFT_HEADERS,
        peft=peft_rows(page.peft)[:LISTED],
        data=as_script(script_data(page, output)),
        libraries=Markup(bundle()),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
    )  # fmt: skip


def script_data(page: Page, output: Path | None) -> dict[str, Any]:
    """What the page's script needs: charts without data, the tables once, the filters."""
    tables = {name: table for name, table in page.views.tables.items() if len(table)}
    # Of the spectra one layer is drawn at a time.
    marks = sum(len(table) for name, table in tables.items() if name != "spectra")
    return {
        "specifications": page.specifications,
        "tables": {name: columns(table) for name, table in tables.items()},
        "filters": page.canvas.filters,
        "initial": page.canvas.initial,
        "subsets": [",".join(map(str, subset)) for subset in page.summarizer.seed_subsets()],
        "folders": None if output is None else folders(page.runs, output),
        "colors": {method: mark.color for method, mark in page.canvas.marks.items()},
        "renderer": "canvas" if marks > CANVAS_ABOVE else "svg",
    }


def folders(runs: pd.DataFrame, output: Path) -> dict[str, Any]:
    """The folders of the runs as seen from the page, their common beginning once."""
    here = output.resolve()
    parents = {folder: os.path.dirname(folder) for folder in runs["folder"]}
    seen = {
        parent: quote(wording.relative(os.path.realpath(parent), here))
        for parent in set(parents.values())
    }
    starts = list(seen)
    return {
        "starts": [seen[parent] for parent in starts],
        "start": [starts.index(parents[folder]) for folder in runs["folder"]],
        "names": [os.path.basename(folder) for folder in runs["folder"]],
    }


@cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, without a way to end its own element."""
    return vl_convert.javascript_bundle(vl_version=VEGA_LITE).replace("</script", "<\\/script")


def environment() -> Environment:
    loader = FileSystemLoader(HERE)
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=keep_units,
    )  # fmt: skip


def keep_units(value: Any) -> Any:
    """No line break between a number and its per cent sign."""
    return value.replace(" %", "\u00a0%") if type(value) is str else value


def as_script(data: dict[str, Any]) -> Markup:
    """JSON that is safe inside a script element whatever the names in it are."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))
