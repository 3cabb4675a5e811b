"""What a user sees while runs work: lines, a bar over steps, a bar over runs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator

import rich
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ERASE_LINE = "\r\x1b[2K"
"""Moves a terminal's cursor to the start of its line and clears the line."""


def say(line: str, style: str = "") -> None:
    """Print one line on rich's console, from rank 0 only; markup in it is not interpreted."""
    if os.environ.get("RANK", "0") != "0":
        return
    console = rich.get_console()
    if console.is_terminal and not first_process():
        console.file.write(ERASE_LINE)  # the first process's bar, which is drawn again below
    console.print(escape(line), style=style, highlight=False, soft_wrap=True)


def first_process() -> bool:
    """Whether this process is not a launcher's worker on this machine."""
    return multiprocessing.current_process().name == "MainProcess"


def shows_bars() -> bool:
    return rich.get_console().is_terminal and sys.stderr.isatty()


@contextlib.contextmanager
def training_bar(steps: int, shown: bool) -> Iterator[Callable[[int, float], None]]:
    """Show a bar over the steps with the loss; yields a function of (steps done, loss)."""
    # Parallel workers share the terminal and would overwrite each other's bars.
    if not (shown and first_process() and shows_bars()):
        yield lambda step, loss: None
        return
    columns = (
        TextColumn("  training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=rich.get_console(), transient=True) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        yield lambda step, loss: progress.update(task, completed=step, loss=loss)


@contextlib.contextmanager
def sweep_bar() -> Iterator[Callable[[float, int, int], None] | None]:
    """Show a bar over the runs of other processes.

    Yields:
        A function of (runs done, all runs, runs at work); None where a bar cannot be shown.
    """
    if not shows_bars():
        yield None
        return
    columns = (
        TextColumn(
            "  {task.fields[done]} of {task.total} runs done, {task.fields[running]} at work"
        ),
        BarColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=rich.get_console(), transient=True) as progress:
        task = progress.add_task("runs", total=1, done=0, running=0)

        def show(done: float, total: int, running: int) -> None:
            progress.update(task, completed=done, total=total, done=int(done), running=running)

        yield show
