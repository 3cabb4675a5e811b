"""The self-contained page: one HTML file that loads nothing and talks to nobody."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import wording
from .gallery import Chart
from .palette import marks, ordered
from .runs import Problem, Run
from .specification import VEGA_LITE, page_specification
from .summary import Row, Summarizer
from .sweeps import Sweep
from .tables import columns, scientific, seconds, significant

HERE = Path(__file__).parent
# Many marks are slow as SVG elements; few are sharper.
CANVAS_ABOVE = 20_000


def render_page(
    *,
    sweep: Sweep,
    heading: str,
    metric: str,
    rows: list[Row],
    runs: list[Run],
    charts: list[Chart],
    problems: list[Problem],
    warnings: list[str],
    majority: float | None,
    summarizer: Summarizer,
    output: Path,
) -> str:
    """HTML of the whole report. Links to run folders are relative to `output`."""
    methods = ordered({run.method for run in runs})
    specifications = {chart.name: page_specification(chart.drawing) for chart in charts}
    values = sum(map(count_values, specifications.values()))
    data = {
        "specifications": specifications,
        "methods": methods,
        "seeds": summarizer.seeds,
        "subsets": [",".join(map(str, subset)) for subset in summarizer.seed_subsets()],
        "renderer": "canvas" if values > CANVAS_ABOVE else "svg",
    }
    examples = int(summarizer.bootstrap.examples) if summarizer.bootstrap is not None else None
    return environment().get_template("template.html.j2").render(
        heading=heading,
        subtitle=sweep.heading if sweep.heading and sweep.heading != heading else None,
        name=sweep.name,
        findings=wording.findings(rows, majority),
        rate_caveat=wording.rate_caveat(runs),
        caveats=wording.caveats(rows, summarizer.seeds, examples),
        facts=wording.facts(runs),
        notes=wording.notes(runs),
        failed=[p for p in problems if p.fatal],
        gaps=[p for p in problems if not p.fatal],
        warnings=warnings,
        marks=marks(methods),
        seeds=summarizer.seeds,
        charts=charts,
        columns=columns(metric),
        rows=rows,
        runs=[
            run_cells(run, output)
            for run in sorted(runs, key=lambda run: (methods.index(run.method), run.seed))
        ],
        metric=metric,
        finished=len(runs),
        data=as_script(data),
        libraries=Markup(bundle()),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
    )  # fmt: skip


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


def count_values(specification: dict[str, Any]) -> int:
    """Rows of data that a specification carries."""
    return sum(len(rows) for rows in specification.get("datasets", {}).values()) + sum(
        len(part.get("data", {}).get("values", []))
        for part in [specification, *specification.get("layer", [])]
    )


def run_cells(run: Run, output: Path) -> dict[str, Any]:
    """What the list of runs shows of one run, as (text, value to sort by)."""
    result = run.result
    gap = (result.get("output_gap") or {}).get("max_abs_logit")
    loss = result.get("loss_test")
    return {
        "run_id": run.run_id,
        "href": quote(wording.relative(run.folder.resolve(), output.resolve())) + "/",
        "method": run.method,
        "seed": run.seed,
        "cells": [
            (f"{100 * run.score:.2f}", run.score),
            (significant(loss), loss),
            (scientific(gap), gap),
            (seconds(result.get("init_seconds")), result.get("init_seconds")),
            (seconds(result.get("train_seconds")), result.get("train_seconds")),
        ],
    }
