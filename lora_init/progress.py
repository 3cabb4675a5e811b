"""Progress bars for loops that may take long: silent unless they do, and only on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import rich
from rich.progress import Progress

Item = TypeVar("Item")

PATIENCE_SECONDS = 1.0


def tracked(items: Iterable[Item], description: str) -> Iterator[Item]:
    """Yield the items; once that takes longer than a second, show a bar on rich's console."""
    console = rich.get_console()
    if not console.is_terminal:
        yield from items
        return
    total = len(items) if hasattr(items, "__len__") else None
    start = time.monotonic()
    shown = False
    progress = Progress(console=console, transient=True)
    task = progress.add_task(description, total=total)
    try:
        for item in items:
            yield item
            progress.advance(task)
            if not shown and time.monotonic() - start > PATIENCE_SECONDS:
                progress.start()
                shown = True
    finally:
        if shown:
            progress.stop()
