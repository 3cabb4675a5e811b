"""The stages of a protocol: grid, extensions, choice, test, equal update size.

Decisions are made from the runs' folders alone, and finished runs are skipped. The same command
therefore completes what a kill, a failure or a full disk left open, with the same choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Protocol

import rich

from ...config.protocol import ProtocolConfig
from ...console import say
from ...errors import ConfigurationError
from ...run.folder import RunFolder
from .outcomes import Outcome, outcome
from .overview import Costs, grid_table, plan_table
from .rates import Choice, choose, first_steps, next_step, rate, rate_for
from .record import Record
from .trials import Entry, Trial, entries, trials


class Jobs(Protocol):
    """What composes and launches trials: a Hydra launcher."""

    workers: int

    def folder(self, overrides: Sequence[str]) -> RunFolder:
        """The folder of the run that these overrides describe."""

    def launch(self, batch: Sequence[Sequence[str]]) -> None:
        """Run them all; a failed run leaves its reason in its folder and stops nothing."""


class Stages:
    """A protocol in progress."""

    def __init__(self, settings: ProtocolConfig, jobs: Jobs, record: Record) -> None:
        settings.check()
        self.settings, self.jobs, self.record = settings, jobs, record
        self.tried: dict[Entry, dict[int, float]] = {}

    def run(self) -> list[str]:
        """Do every stage; returns the labels of the arms that are incomplete."""
        settings = self.settings
        for entry in entries(settings):
            self.tried[entry] = {k: self.rate(entry, k) for k in first_steps(settings.grid)}
        grid = self.settings_of(self.tried)
        arms, seeds = len(self.tried), len(settings.seeds)
        count = f"{arms} arms at {settings.grid} learning rates and {seeds} seeds"
        say(f"protocol: {count}, {len(grid)} runs in the first grid", style="bold")
        if not self.plan(grid) and not settings.dry_run:
            say("one run first, to estimate the time")
            self.jobs.launch([grid[0].overrides(settings, read_test=False)])
            self.plan(grid)
        if settings.dry_run:
            return []
        self.train("grid", grid)
        self.extend()
        choices = self.choose()
        self.test(choices)
        if settings.equal_update:
            self.match_updates(choices)
        return [entry.label(settings) for entry in self.tried if entry not in choices]

    def rate(self, entry: Entry, step: int) -> float:
        """The rate `step` places above the middle of the arm's grid."""
        middle = self.settings.learning_rates.get(entry.arm, self.settings.learning_rate)
        return rate(middle, step, self.settings.per_decade)

    def settings_of(self, tried: dict[Entry, dict[int, float]]) -> list[Trial]:
        """All trials, seeds outermost: early on, each setting already has one run."""
        all_trials = [
            trial
            for entry, rates in tried.items()
            for rate in rates.values()
            for trial in trials(self.settings, entry, rate)
        ]
        order = {seed: place for place, seed in enumerate(self.settings.seeds)}
        return sorted(all_trials, key=lambda trial: order[trial.seed])

    def outcome(self, trial: Trial) -> Outcome:
        return outcome(self.jobs.folder(trial.overrides(self.settings, read_test=False)))

    def plan(self, grid: list[Trial]) -> bool:
        """Show what is left; returns whether its time is known."""
        outcomes = [(trial, self.outcome(trial)) for trial in grid]
        costs, workers = Costs(outcomes), self.jobs.workers
        missing = [trial for trial, outcome in outcomes if outcome.state == "missing"]
        tested = len(self.tried) * len(self.settings.seeds)
        parts = {"grid": costs.train(missing, workers)}
        if self.settings.max_extensions:
            # An arm may extend its grid or not; one place is a fair guess.
            further = [t for entry in self.tried for t in trials(self.settings, entry, 1.0)]
            parts["extensions, one an arm"] = costs.train(further, workers)
        parts["test of the chosen"] = costs.test(tested, workers)
        if self.settings.equal_update:
            others = [t for e in self.tried if e.arm != self.settings.baseline
                      for t in trials(self.settings, e, 1.0)]  # fmt: skip
            parts["equal update size"] = costs.train(others, workers)
        rich.get_console().print(plan_table(parts))
        return costs.known

    def train(self, stage: str, wanted: list[Trial], read_test: bool = False) -> None:
        say(f"stage {stage}: {len(wanted)} runs", style="bold")
        overrides = [trial.overrides(self.settings, read_test) for trial in wanted]
        # Before they run, so that `experiments.status` shows missing ones.
        self.record.stage(stage, [self.jobs.folder(each) for each in overrides])
        self.jobs.launch(overrides)

    def merits(self, entry: Entry) -> dict[float, list[float]] | None:
        """The figures of each tried rate, one per seed; None while one is missing."""
        found: dict[float, list[float]] = {}
        for each in self.tried[entry].values():
            outcomes = [self.outcome(trial) for trial in trials(self.settings, entry, each)]
            if any(one.state == "missing" for one in outcomes):
                return None
            found[each] = [one.merit(self.settings.select_by) for one in outcomes]
        return found

    def extend(self) -> None:
        """Extend the grids whose best rate is at an edge, all arms together."""
        left = dict.fromkeys(self.tried, self.settings.max_extensions)
        for turn in range(1, self.settings.max_extensions + 1):
            further: list[Trial] = []
            for entry, tried in self.tried.items():
                merits = self.merits(entry)
                if merits is None:
                    continue
                best = choose(merits).rate
                place = next(k for k, value in tried.items() if value == best)
                beyond = next_step(tried, place, left[entry])
                if beyond is not None:
                    tried[beyond] = self.rate(entry, beyond)
                    left[entry] -= 1
                    further += trials(self.settings, entry, tried[beyond])
            if not further:
                return
            self.train(f"extension {turn}", further)

    def choose(self) -> dict[Entry, Choice]:
        """The best rate of each arm that is complete."""
        found = {entry: self.merits(entry) for entry in self.tried}
        whole = {entry: merits for entry, merits in found.items() if merits is not None}
        choices = {entry: choose(merits) for entry, merits in whole.items()}
        labels = {entry: entry.label(self.settings) for entry in whole}
        rich.get_console().print(
            grid_table(
                {labels[entry]: merits for entry, merits in whole.items()},
                {labels[entry]: choice for entry, choice in choices.items()},
                self.settings.select_by,
            )
        )
        for entry, choice in choices.items():
            chosen = [self.outcome(t) for t in trials(self.settings, entry, choice.rate)]
            finished = [one.result for one in chosen if one.result is not None]
            self.record.selected[labels[entry]] = {
                "arm": entry.arm,
                "method": finished[0]["method"] if finished else None,
                "rank": entry.rank,
                "learning_rate": choice.rate,
                "validation_score": (
                    fmean(result["validation_score"] for result in finished)
                    if len(finished) == len(chosen)
                    else None
                ),
                "at_edge": choice.at_edge,
                "runs": [one.folder.id for one in chosen],
            }
        self.record.write()
        return choices

    def test(self, choices: dict[Entry, Choice]) -> None:
        """Read the test set for the chosen settings, except for diverged runs."""
        wanted = [
            trial
            for entry, choice in choices.items()
            for trial in trials(self.settings, entry, choice.rate)
            if self.outcome(trial).state == "finished"
        ]
        if wanted:
            self.train("test", wanted, read_test=True)

    def match_updates(self, choices: dict[Entry, Choice]) -> None:
        """Run each arm at the rate that gives the baseline's update size at the same rank."""
        matched: dict[Entry, dict[str, float]] = {}
        for entry in choices:
            anchor = Entry(self.settings.baseline, entry.rank)
            if entry == anchor or anchor not in choices:
                continue
            target = self.update_size(anchor, choices[anchor].rate)
            sizes = {each: self.update_size(entry, each) for each in self.tried[entry].values()}
            known = {each: size for each, size in sizes.items() if size is not None}
            found = rate_for(known, target) if target is not None and len(known) > 1 else None
            if found is None:
                say(
                    f"  {entry.label(self.settings)} is not compared at equal update size: no rate "
                    "tried so far reaches the baseline's size"
                )
                continue
            matched[entry] = {"learning_rate": found, "target": target}
        wanted = [
            trial
            for entry, match in matched.items()
            for trial in trials(self.settings, entry, match["learning_rate"])
        ]
        if not wanted:
            return
        self.train("equal update", wanted, read_test=True)
        for entry, match in matched.items():
            chosen = trials(self.settings, entry, match["learning_rate"])
            self.record.equal_update[entry.label(self.settings)] = {
                "arm": entry.arm,
                "rank": entry.rank,
                **match,
                "update_size": self.update_size(entry, match["learning_rate"]),
                "runs": [self.outcome(trial).folder.id for trial in chosen],
            }
        self.record.write()

    def update_size(self, entry: Entry, at: float) -> float | None:
        """The mean over seeds; None if a run has none."""
        sizes = [self.outcome(t).update_size() for t in trials(self.settings, entry, at)]
        return None if None in sizes else fmean(sizes)


def refuse_incomplete(labels: list[str]) -> None:
    """Name the arms that have no choice yet.

    Raises:
        ConfigurationError: there are such arms.
    """
    if labels:
        raise ConfigurationError(
            f"no learning rate was chosen for {', '.join(labels)}: runs are missing. Give the same "
            "command again to complete them; each failed run's failed.json has the reason."
        )
