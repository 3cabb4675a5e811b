"""Report on finished runs: `python -m experiments.report FOLDER [FOLDER…] [--output FOLDER]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..config.location import qualified
from .contents import Report
from .mirror import log_to_wandb
from .output import write_report
from .sweeps import load_sweeps

SHOWN = 20  # problems that the terminal lists


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    console = Console()
    try:
        output = options.output or options.folders[0] / "report"
        report = make(options.folders, output, options.compare, options.peft_results, options.page)
        logged = log_to_wandb(report, options.wandb) if options.wandb else None
    except (ValueError, OSError) as error:
        stderr = Console(stderr=True, soft_wrap=True, highlight=False)
        stderr.print(f"[red]error:[/red] {escape(str(error))}")
        return 1
    show(report, console)
    if logged:
        console.print(f"wandb: {logged} (upload with `wandb sync`)", soft_wrap=True)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m {qualified('report')}",
        description="Gather finished runs into one page with charts, pictures and tables.",
    )
    made.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER",
        help="a sweep (with a manifest.json), or a folder whose subfolders are runs",
    )  # fmt: skip
    made.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write (default: FOLDER/report)"
    )
    made.add_argument(
        "--compare", type=Path, metavar="OTHER",
        help="a sweep of the same settings with another version of the code",
    )  # fmt: skip
    made.add_argument(
        "--peft-results", type=Path, metavar="PATH",
        help="PEFT's method_comparison/…/results folder, or one of its files, to show next to ours",
    )  # fmt: skip
    made.add_argument(
        "--wandb", nargs="?", const="lora_init", metavar="PROJECT",
        help="log pictures, table and page to an offline wandb run in the sweep's group",
    )  # fmt: skip
    made.add_argument(
        "--page", type=Path, metavar="FILE",
        help="also write the page as a single file without links to runs and pictures",
    )  # fmt: skip
    return made


def make(
    folders: list[Path],
    output: Path,
    other: Path | None = None,
    peft: Path | None = None,
    alone: Path | None = None,
) -> Report:
    """Read the runs and write the report. The current step is shown on stderr."""
    with Console(stderr=True).status("[bold]report[/bold] reading runs") as status:
        return write_report(
            load_sweeps(folders),
            output,
            lambda step: status.update(f"[bold]report[/bold] {escape(step)}"),
            load_sweeps([other]) if other else None,
            peft,
            alone,
        )


def show(report: Report, console: Console) -> None:
    for problem in report.problems[:SHOWN]:
        kind = "left out" if problem.fatal else "incomplete"
        text = escape(f"{problem.run}: {problem.reason}")
        console.print(f"[red]{kind}[/red] {text}", soft_wrap=True)
    if len(report.problems) > SHOWN:
        console.print(f"[red]and[/red] {len(report.problems) - SHOWN} more; the page lists all")
    for warning in report.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True)
    *compared, results = report.tables(narrow=True)
    console.print(results.terminal())
    console.print("± is half of the 95 % interval; the page explains what it covers", style="dim")
    for table in compared:
        console.print(table.terminal(close=True))
        console.print(
            "?: not resolved; tie: equal within the margin that the page states", style="dim"
        )
    for sentence in report.headline:
        console.print(sentence, highlight=False, markup=False)
    for label, value in report.comparison.facts() if report.comparison else ():
        console.print(f"{label}: {value}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"report: {report.page}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
