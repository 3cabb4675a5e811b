"""Report on finished runs: `python -m experiments.report FOLDER [FOLDER…] [--output FOLDER]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .sweeps import load_sweeps
from .tables import terminal_table
from .writing import Report, write_report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Gather finished runs into one page with charts, pictures and tables.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER",
        help="a sweep (with a manifest.json), or a folder whose sub-folders are runs",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write (default: FOLDER/report)"
    )
    options = parser.parse_args(arguments)
    console = Console()
    try:
        report = make(options.folders, options.output or options.folders[0] / "report")
    except (ValueError, OSError) as error:
        complaint = Console(stderr=True, soft_wrap=True, highlight=False)
        complaint.print(f"[red]error:[/red] {escape(str(error))}")
        return 1
    show(report, console)
    return 0


def make(folders: list[Path], output: Path) -> Report:
    """Read and write, with the step in progress on stderr (so that pipes stay clean)."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("[bold]report[/bold] {task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("reading runs", total=None)
        sweep = load_sweeps(folders)
        return write_report(sweep, output, lambda step: bar.update(task, description=step))


def show(report: Report, console: Console) -> None:
    for problem in report.problems:
        kind = "left out" if problem.fatal else "incomplete"
        told = escape(f"{problem.run}: {problem.reason}")
        console.print(f"[red]{kind}[/red] {told}", soft_wrap=True)
    for warning in report.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True)
    console.print(terminal_table(report.rows, report.metric, report.heading))
    console.print("± is half of the 95 % interval; the page says what it covers", style="dim")
    console.print(f"report: {report.page}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
