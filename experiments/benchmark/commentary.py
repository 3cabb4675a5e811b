"""What a strategy took, told as soon as it is known: a model's table comes minutes later."""

from __future__ import annotations

import time
from typing import Any

from experiments.benchmark.cases import NAMES, Case
from experiments.benchmark.tables import amount
from experiments.console import say


class Commentary:
    """Hears the reports of one model's process; says a line whenever a strategy is done."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.since = time.perf_counter()

    def hear(self, told: dict[str, Any]) -> None:
        """Strategies come one after the other: the first report of the next ends the last."""
        before = self.reports[-1] if self.reports else told
        if (before.get("rank"), before.get("method")) != (told.get("rank"), told.get("method")):
            self.conclude()
        self.reports.append(told)

    def conclude(self) -> None:
        """Say what is known of the strategy at hand, and forget it."""
        reports, self.reports = self.reports, []
        passed, self.since = time.perf_counter() - self.since, time.perf_counter()
        if not reports or "method" not in reports[-1]:
            return
        case = Case.of(reports, reports[-1]["rank"], reports[-1]["method"])
        told = [
            f"{label} {amount(seconds, 's')}"
            for name, label in NAMES.items()
            if (seconds := case.median_of(name)) is not None
        ]
        what = f"r {case.rank} {case.method}"
        say(f"    {what:22s} {', '.join(told) or 'no time'}  (measured in {passed:.0f} s)", "dim")
