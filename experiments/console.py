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


def say(line: str, style: str = "") -> None:
    """One line on rich's console, from the first process only; markup in it is shown as it is."""
    if os.environ.get("RANK", "0") != "0":
        return
    rich.get_console().print(escape(line), style=style, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def training_bar(steps: int, shown: bool) -> Iterator[Callable[[int, float], None]]:
    """A bar over the steps with the current loss; yields a function of (steps done, loss)."""
    console = rich.get_console()
    # Parallel workers share the terminal, where their bars would run into each other.
    alone = multiprocessing.current_process().name == "MainProcess"
    if not (shown and alone and console.is_terminal and sys.stderr.isatty()):
        yield lambda step, loss: None
        return
    columns = (
        TextColumn("  training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        yield lambda step, loss: progress.update(task, completed=step, loss=loss)
