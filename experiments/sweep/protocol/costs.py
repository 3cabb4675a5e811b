"""How long what is missing will take, from the runs that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from experiments.sweep.protocol.outcomes import Outcome
from experiments.sweep.protocol.trials import Trial


@dataclass(frozen=True)
class Estimate:
    """Runs still to be made, and their seconds with so many workers; None without a finished run
    to go by."""

    runs: int
    seconds: float | None


class Costs:
    """Seconds of a run by its arm; an arm without a finished run takes the others' mean."""

    def __init__(self, outcomes: Sequence[tuple[Trial, Outcome]]) -> None:
        self.training: dict[str, list[float]] = {}
        self.testing: list[float] = []
        for trial, outcome in outcomes:
            if outcome.result is not None:
                spent = outcome.result["wall_seconds"]
                self.training.setdefault(trial.entry.arm, []).append(spent)
                # What a later test does too: load, evaluate, write.
                beside = outcome.result["train_seconds"] + outcome.result["init_seconds"]
                self.testing.append(outcome.result.get("test_seconds") or spent - beside)

    @property
    def known(self) -> bool:
        return bool(self.training)

    def of(self, trial: Trial) -> float:
        everywhere = [spent for arm in self.training.values() for spent in arm]
        return fmean(self.training.get(trial.entry.arm, everywhere))

    def train(self, missing: Sequence[Trial], workers: int) -> Estimate:
        """Of training runs; workers share them evenly."""
        seconds = sum(map(self.of, missing)) / workers if self.known else None
        return Estimate(len(missing), seconds)

    def test(self, count: int, workers: int) -> Estimate:
        """Of reading the test set for `count` trained runs."""
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
