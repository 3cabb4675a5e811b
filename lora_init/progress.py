"""Progress bars for long loops: shown on a terminal only, and only after one second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

import rich
from rich.progress import Progress

Item = TypeVar("Item")

PATIENCE_SECONDS = 1.0


def tracked(items: Iterable[Item], description: str) -> Iterator[Item]:
    """Yield the items, and show a progress bar once that takes longer than a second."""
    total = len(items) if isinstance(items, Sized) else None
    with tracking(total, description) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def tracking(total: int | None, description: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for any work; yields a function that adds to the finished count."""
    console = rich.get_console()
    if not console.is_terminal:
        yield lambda count: None
        return
    start = time.monotonic()
    shown = False
    progress = Progress(console=console, transient=True)
    task = progress.add_task(description, total=total)

    def advance(count: int) -> None:
        nonlocal shown
        progress.advance(task, count)
        if not shown and time.monotonic() - start > PATIENCE_SECONDS:
            progress.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            progress.stop()
