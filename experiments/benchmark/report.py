"""Everything that a benchmark leaves behind, in `outputs/benchmark/<machine>/`.

`table.md` for a README, each chart as page, SVG and PNG, and `result.json`, which is written last
and atomically: where it exists, the rest is complete.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vl_convert

from experiments.benchmark.chart import charts
from experiments.benchmark.rows import Row
from experiments.benchmark.sections import SECTIONS
from experiments.benchmark.settings import BenchmarkConfig, to_plain
from experiments.benchmark.tables import markdown_table
from experiments.environment import cpu_name, describe_environment, version
from experiments.report.specification import VEGA_LITE
from experiments.runs import write_json, write_text


def folder(settings: BenchmarkConfig) -> Path:
    """A machine's own folder: results of different hardware never overwrite each other."""
    return Path(settings.outputs) / "benchmark" / machine(environment(settings))


def environment(settings: BenchmarkConfig) -> dict[str, Any]:
    known = describe_environment()
    known["packages"]["peft"] = version("peft")
    return known | {"device": settings.device}


def machine(known: dict[str, Any]) -> str:
    """A folder's name: the GPU that was measured, or the CPU with its threads."""
    gpu = known["gpu"] if known["device"] == "cuda" else None
    name = gpu or f"{cpu_name()} {known['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_report(settings: BenchmarkConfig, rows: Sequence[Row], output: Path) -> None:
    """Write table, chart and result into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").unlink(missing_ok=True)  # the files change before it is there again
    known = environment(settings)
    write_text(output / "table.md", markdown(rows, known))
    for name, specification in charts(rows).items():
        write_chart(name, specification, output)
    result = {
        "status": "finished",
        "settings": to_plain(settings),
        "environment": known,
        "rows": [asdict(row) for row in rows],
    }
    write_json(output / "result.json", result)


def write_chart(name: str, specification: dict[str, Any], output: Path) -> None:
    """One specification as an interactive page, as SVG, and as PNG at twice the size."""
    page = vl_convert.vegalite_to_html(specification, vl_version=VEGA_LITE, bundle=True)
    svg = vl_convert.vegalite_to_svg(specification, vl_version=VEGA_LITE)
    write_text(output / f"{name}.html", page)
    write_text(output / f"{name}.svg", svg)
    (output / f"{name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=2))


def markdown(rows: Sequence[Row], known: dict[str, Any]) -> str:
    """A heading and a table a section, then how to read them and where they come from."""
    parts = []
    for section, module in SECTIONS.items():
        chosen = [row for row in rows if row.section == section]
        if chosen:
            table = markdown_table(chosen, getattr(module, "EXTRA", None))
            parts.append(f"**{section}**: {module.TITLE}\n\n{table}\n")
    parts.append(
        "Ratios are the peer's figure / ours: above 1 ours takes less. Medians over pairs measured "
        "in turns, with 95 % bootstrap intervals where there are five pairs or more; a target is "
        "open where the interval contains it.\n"
    )
    parts.append(f"Measured on {described(known)}.\n")
    return "\n".join(parts)


def described(known: dict[str, Any]) -> str:
    """The environment in one line."""
    place = known["gpu"] if known["device"] == "cuda" else f"{known['threads']} threads"
    packages = known["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft"))
    return f"{known['cpu']}, {known['cores']} cores, {place}; {versions}"
