"""What a user sees while a run works: one line before, a progress bar, one line after."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator

import rich
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ERASED = "\r\x1b[2K"
"""An empty line, of a terminal, in the place of the one that the cursor stands in."""


def say(line: str, style: str = "") -> None:
    """One line on rich's console, from the first process only; markup in it is shown as it is."""
    if os.environ.get("RANK", "0") != "0":
        return
    console = rich.get_console()
    if console.is_terminal and not first_process():
        console.file.write(ERASED)  # the first process's bar; it is drawn again below
    console.print(escape(line), style=style, highlight=False, soft_wrap=True)


def first_process() -> bool:
    """Whether this is no worker of a launcher on this machine."""
    return multiprocessing.current_process().name == "MainProcess"


def shows_bars() -> bool:
    return rich.get_console().is_terminal and sys.stderr.isatty()


@contextlib.contextmanager
def training_bar(steps: int, shown: bool) -> Iterator[Callable[[int, float], None]]:
    """A bar over the steps with the current loss; yields a function of (steps done, loss)."""
    # Parallel workers share the terminal, where their bars would run into each other.
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
    """A bar over runs of other processes, in one line, which their lines may replace; yields a
    function of (runs done, all runs, runs at work), or None where no bar can be shown.
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
