"""What is being measured right now, on one line at the foot of a terminal; nothing elsewhere."""

from __future__ import annotations

import math
from types import TracebackType

import rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from experiments.benchmark.clock import Clock


class TimeLeft(ProgressColumn):
    """What is left of a clock's seconds."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def render(self, task: Task) -> Text:
        return Text(time_left(self.clock), style="dim")


def time_left(clock: Clock) -> str:
    if math.isinf(clock.left):
        return ""
    minutes, seconds = divmod(max(round(clock.left), 0), 60)
    return f"at most {minutes}:{seconds:02d} left"


class Ticker:
    """A line that says what is at hand, how far it has come and how long it may still take."""

    def __init__(self, text: str, clock: Clock, total: int | None = None) -> None:
        console = rich.get_console()
        self.shown = console.is_terminal
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeLeft(clock),
        )
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task(text, total=total)

    def __enter__(self) -> Ticker:
        if self.shown:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.shown:
            self.progress.stop()

    def show(self, text: str) -> None:
        self.progress.update(self.task, description=text)

    def total(self, count: int) -> None:
        self.progress.update(self.task, total=count)

    def advance(self) -> None:
        self.progress.advance(self.task)
