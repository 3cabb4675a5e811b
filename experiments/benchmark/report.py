"""Everything that a benchmark leaves behind, in `outputs/benchmark/<machine>/`.

`table.md` with everything, `readme.md` with what fits into a README, each chart as page, SVG and
PNG, and `result.json`, which is written last and atomically: where it exists, the rest is complete.
While the benchmark runs, tables and `unfinished.json` hold the rows that are known by then.
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
from experiments.benchmark.summary import summary
from experiments.benchmark.tables import markdown_table
from experiments.report.specification import VEGA_LITE
from experiments.run.environment import cpu_name, describe_environment, version
from experiments.run.files import write_json, write_text


def environment(settings: BenchmarkConfig) -> dict[str, Any]:
    known = describe_environment()
    known["packages"]["peft"] = version("peft")
    return known | {"device": settings.device}


def machine(known: dict[str, Any]) -> str:
    """A folder's name: results of different hardware never overwrite each other. The GPU that was
    measured, or the CPU with its threads.
    """
    gpu = known["gpu"] if known["device"] == "cuda" else None
    name = gpu or f"{cpu_name()} {known['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Ledger:
    """The rows measured so far, in the folder as soon as they are known."""

    def __init__(self, settings: BenchmarkConfig) -> None:
        self.settings = settings
        self.known = environment(settings)
        self.output = Path(settings.outputs) / "benchmark" / machine(self.known)
        self.rows: list[Row] = []

    def hear(self, row: Row) -> None:
        """Enter a row; what an earlier benchmark left is no longer true from the first one on."""
        if not self.rows:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "result.json").unlink(missing_ok=True)
        self.rows.append(row)
        self._write_tables("**Unfinished**: the benchmark was still running.\n\n")
        write_json(self.output / "unfinished.json", self._content("unfinished"))

    def draw(self) -> None:
        """The charts of what is known."""
        for name, specification in charts(self.rows).items():
            write_chart(name, specification, self.output)

    def finish(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "result.json").unlink(missing_ok=True)  # the files change before it is there
        self._write_tables()
        self.draw()
        write_json(self.output / "result.json", self._content("finished"))
        (self.output / "unfinished.json").unlink(missing_ok=True)

    def _write_tables(self, heading: str = "") -> None:
        write_text(self.output / "table.md", heading + markdown(self.rows, self.known))
        write_text(self.output / "readme.md", heading + summary(self.rows, described(self.known)))

    def _content(self, status: str) -> dict[str, Any]:
        return {
            "status": status,
            "settings": to_plain(self.settings),
            "environment": self.known,
            "rows": [asdict(row) for row in self.rows],
        }


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
