"""What the terminal shows of a protocol: what is left and how long it takes, and the grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from .outcomes import Outcome
from .rates import Choice
from .trials import Trial


@dataclass(frozen=True)
class Estimate:
    """Missing runs, and the seconds that they take; None without a finished run."""

    runs: int
    seconds: float | None


class Costs:
    """Seconds of a run, by arm; an arm without a finished run uses the mean of the others."""

    def __init__(self, outcomes: Sequence[tuple[Trial, Outcome]]) -> None:
        self.training: dict[str, list[float]] = {}
        self.testing: list[float] = []
        for trial, outcome in outcomes:
            if outcome.result is not None:
                spent = outcome.result["wall_seconds"]
                self.training.setdefault(trial.entry.arm, []).append(spent)
                # A later test also loads, evaluates and writes.
                learning = outcome.result["train_seconds"] + outcome.result["init_seconds"]
                self.testing.append(outcome.result.get("test_seconds") or spent - learning)

    @property
    def known(self) -> bool:
        return bool(self.training)

    def of(self, trial: Trial) -> float:
        everywhere = [spent for arm in self.training.values() for spent in arm]
        return fmean(self.training.get(trial.entry.arm, everywhere))

    def train(self, missing: Sequence[Trial], workers: int) -> Estimate:
        """The cost of training runs, shared evenly by workers."""
        seconds = sum(map(self.of, missing)) / workers if self.known else None
        return Estimate(len(missing), seconds)

    def test(self, count: int, workers: int) -> Estimate:
        """The cost of reading the test set for `count` trained runs."""
        seconds = count * fmean(self.testing) / workers if self.testing else None
        return Estimate(count, seconds)


def duration(seconds: float) -> str:
    """Seconds in words: "40 s", "12 min", "3.5 h".

    >>> duration(40), duration(754), duration(12_600)
    ('40 s', '13 min', '3.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan_table(parts: Mapping[str, Estimate]) -> Table:
    """One line per stage: how many runs are left, and about how long they take."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("stage")
    table.add_column("runs left", justify="right")
    table.add_column("about", justify="right")
    for name, estimate in parts.items():
        time = "?" if estimate.seconds is None else duration(estimate.seconds)
        table.add_row(name, str(estimate.runs), time)
    return table


def grid_table(
    merits: Mapping[str, Mapping[float, list[float]]], choices: Mapping[str, Choice], select_by: str
) -> Table:
    """Mean validation figure by arm and learning rate; the chosen one in bold."""
    rates = sorted({rate for by_rate in merits.values() for rate in by_rate})
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("validation score, %" if select_by == "score" else "validation loss")
    for rate in rates:
        table.add_column(f"{rate:g}", justify="right")
    for label, by_rate in merits.items():
        chosen = choices[label].rate if label in choices else None
        cells = [cell(by_rate.get(rate), rate == chosen, select_by) for rate in rates]
        table.add_row(label, *cells)
    return table


def cell(figures: list[float] | None, chosen: bool, select_by: str) -> str:
    if figures is None:
        return ""
    mean = sum(figures) / len(figures)
    if math.isinf(mean):
        return "diverged"
    text = f"{100 * mean:.1f}" if select_by == "score" else f"{-mean:.3f}"
    return f"[bold]{text}[/bold]" if chosen else text
