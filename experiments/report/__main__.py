"""Report on finished runs: `python -m experiments.report FOLDER [FOLDER…] [--output FOLDER]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .findings import compared
from .mirror import log_to_wandb
from .output import Report, write_report
from .result_table import terminal_table
from .sweeps import load_sweeps

SHOWN = 20  # problems that the terminal names


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
    parser.add_argument(
        "--compare", type=Path, metavar="OTHER",
        help="a sweep of the same settings over another version of the code",
    )  # fmt: skip
    parser.add_argument(
        "--peft-results", type=Path, metavar="PATH",
        help="PEFT's method_comparison/…/results folder, or one of its files: rows beside ours",
    )  # fmt: skip
    parser.add_argument(
        "--wandb", nargs="?", const="lora_init", metavar="PROJECT",
        help="log pictures, table and page to an offline wandb run in the sweep's group",
    )  # fmt: skip
    parser.add_argument(
        "--page", type=Path, metavar="FILE",
        help="write the page to hand on, too: one file, without links to runs and pictures",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    console = Console()
    try:
        output = options.output or options.folders[0] / "report"
        report = make(options.folders, output, options.compare, options.peft_results, options.page)
        logged = log_to_wandb(report, options.wandb) if options.wandb else None
    except (ValueError, OSError) as error:
        complaint = Console(stderr=True, soft_wrap=True, highlight=False)
        complaint.print(f"[red]error:[/red] {escape(str(error))}")
        return 1
    show(report, console)
    if logged:
        console.print(f"wandb: {logged} (upload with `wandb sync`)", soft_wrap=True)
    return 0


def make(
    folders: list[Path],
    output: Path,
    other: Path | None = None,
    peft: Path | None = None,
    alone: Path | None = None,
) -> Report:
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
        return write_report(
            sweep, output, lambda step: bar.update(task, description=step),
            load_sweeps([other]) if other else None, peft, alone,
        )  # fmt: skip


def show(report: Report, console: Console) -> None:
    for problem in report.problems[:SHOWN]:
        kind = "left out" if problem.fatal else "incomplete"
        told = escape(f"{problem.run}: {problem.reason}")
        console.print(f"[red]{kind}[/red] {told}", soft_wrap=True)
    if len(report.problems) > SHOWN:
        console.print(f"[red]and[/red] {len(report.problems) - SHOWN} more; the page names all")
    for warning in report.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True)
    console.print(terminal_table(report.rows, report.metric, report.heading))
    console.print("± is half of the 95 % interval; the page says what it covers", style="dim")
    if report.comparison is not None:
        console.print(compared(report.comparison), soft_wrap=True, highlight=False)
    console.print(f"report: {report.page}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
