"""A model's strategies as they are measured: what is at hand, and each row once it is known."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from experiments.benchmark.cases import NAMES, Case
from experiments.benchmark.clock import Clock
from experiments.benchmark.comparison import rows_of
from experiments.benchmark.rates import Rates
from experiments.benchmark.rows import Hear, Row
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.tables import amount, quality, ratio, target
from experiments.benchmark.ticker import Ticker
from experiments.console import say


class Commentary:
    """Hears the reports of one model's process, or of several that go on behind each other.

    Attributes:
        begun: (rank, method) of every strategy that was come to.
        rows: of those that are done.
    """

    def __init__(
        self, name: str, settings: BenchmarkConfig, rates: Rates, hear_row: Hear, clock: Clock
    ) -> None:
        self.name, self.settings, self.rates, self.hear_row = name, settings, rates, hear_row
        self.begun: list[tuple[int, str]] = []
        self.rows: list[Row] = []
        self.reports: list[dict[str, Any]] = []
        self.plain: dict[str, Any] | None = None
        self.since = time.perf_counter()
        self.ticker = Ticker(f"{name}: loading", clock)

    def __enter__(self) -> Commentary:
        self.ticker.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ticker.__exit__(kind, error, trace)

    def hear(self, told: dict[str, Any]) -> None:
        """Strategies come one after the other: the first report of the next ends the last."""
        if "plain" in told:
            self.plain = told
        if "strategies" in told:
            self.ticker.total(told["strategies"])
        if "method" not in told:
            return
        case = told["rank"], told["method"]
        if not self.begun or self.begun[-1] != case:
            self.conclude()
            self.begun.append(case)
        self.reports.append(told)
        doing = told.get("doing")
        at = f"{self.name}: r {told['rank']} {told['method']}"
        self.ticker.show(f"{at}, {doing}" if doing else at)

    def conclude(self, failure: str | None = None) -> None:
        """Make the row of the strategy at hand and say it; `failure` is what broke it off."""
        reports, self.reports = self.reports, []
        passed, self.since = time.perf_counter() - self.since, time.perf_counter()
        if not reports:
            return
        case = Case.of(reports, *self.begun[-1])
        if failure is not None:
            case.notes.append(f"process: {failure}")
        made = rows_of(self.name, case, self.settings, self.rates, self.plain)
        for row in made:
            self.rows.append(row)
            self.hear_row(row)
            say(f"    r {case.rank} {line(row)}", "dim")
        say(f"      measured in {passed:.0f} s", "dim")
        self.ticker.advance()


def line(row: Row) -> str:
    """A row in one line: who took how long, the ratio with its target, and the quality."""
    times = [
        f"{NAMES[name]} {amount(seconds, row.unit)}"
        for name, seconds in (("ours", row.ours), ("peft", row.peft), ("exact", row.exact))
        if seconds is not None
    ]
    told = [", ".join(times) or "no time"]
    if row.ratio is not None:
        told.append(f"{row.peer} / ours {ratio(row)}")
    if row.verdict is not None:
        told.append(target(row))
    told += [quality(name, found) for name, found in row.quality.items()]
    return f"{row.case:18s} {'; '.join(told)}"
