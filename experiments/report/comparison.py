"""Two sweeps of the same settings with two versions of the code, side by side.

Runs are paired by task, arm, learning rate and seed. A figure is flagged if the 95 % interval of
its paired difference excludes zero. The interval of scores is a bootstrap over examples and seeds
if there are predictions and not too many runs, else Student's t over seeds. Without an interval
nothing is flagged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .arms import without_rank
from .cells import difference_text, mantissa, number
from .runs import Problem
from .statistics import Bootstrap, Interval, seed_interval
from .summary import align_examples
from .table import Table

SETTING = ("model", "data", "method", "rank", "series", "learning_rate")
FIGURES = {"score": "score", "init_seconds": "init s", "output_gap": "output gap"}
READ = 400  # runs whose predictions are read; scores of more are compared over seeds alone
HEADERS = (
    "method", "task", "learning rate", "seeds", "score of", "difference, points", "init s",
    "output gap", "differs",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Means over the paired seeds, and the interval of ours - theirs."""

    ours: float
    theirs: float
    difference: Interval

    @property
    def differs(self) -> bool:
        return not np.isnan(self.difference.low) and not self.difference.contains_zero


@dataclass(frozen=True)
class Change:
    """One setting that both sweeps have."""

    task: str
    arm: str
    method: str
    learning_rate: float
    tested: bool  # whether the score is the test score; else it is the validation score
    seeds: int
    figures: dict[str, Figure]

    @property
    def flagged(self) -> list[str]:
        """The figures that differ."""
        return [label for name, label in FIGURES.items() if self.figures[name].differs]

    def cells(self) -> list[str]:
        """The change as text, in the order of `HEADERS`."""
        score, time, gap = (self.figures[name] for name in FIGURES)
        return [
            self.arm, self.task, mantissa(self.learning_rate), str(self.seeds),
            "test" if self.tested else "validation", difference_text(score.difference),
            f"{number(time.theirs)} → {number(time.ours)}",
            f"{number(gap.theirs)} → {number(gap.ours)}",
            ", ".join(self.flagged),
        ]  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """All settings of two sweeps.

    Attributes:
        name, other: the sweeps' names.
        commits, other_commits: the code that each was run with.
        alone, other_alone: the number of runs without a partner.
    """

    name: str
    other: str
    commits: list[str]
    other_commits: list[str]
    changes: list[Change]
    alone: int
    other_alone: int

    @property
    def table(self) -> Table:
        title = f"{self.name} against {self.other}"
        return Table(title, HEADERS, [change.cells() for change in self.changes])

    def facts(self) -> list[tuple[str, str]]:
        """Labels with their values, for the head of the table."""
        facts = [
            ("This sweep", f"{self.name}, commit {', '.join(self.commits)}"),
            ("Other sweep", f"{self.other}, commit {', '.join(self.other_commits)}"),
            ("Settings in both", str(len(self.changes))),
            ("Beyond their interval", str(sum(bool(change.flagged) for change in self.changes))),
        ]
        if self.alone or self.other_alone:
            alone = f"{self.alone} here, {self.other_alone} there"
            facts.append(("Runs without a partner", alone))
        return facts


def compare(
    runs: pd.DataFrame, others: pd.DataFrame, names: tuple[str, str], problems: list[Problem]
) -> Comparison:
    """Pair the runs of two sweeps and compare every setting that both have.

    Args:
        runs, others: tables of runs with `task` and `arm`.
        names: of the two sweeps.
        problems: what cannot be read is added to it.
    """
    mine, theirs = (frame.assign(series=frame["arm"].map(without_rank)) for frame in (runs, others))
    pairs = mine.merge(theirs, on=[*SETTING, "seed"], suffixes=("", "_other"))
    bootstraps = {}
    tested = pairs[pairs["tested"] & pairs["tested_other"]]
    if 2 * len(tested) <= READ:
        for task, group in tested.groupby("task"):  # the other sweep may name it differently
            bootstraps[task] = paired_bootstrap(group, problems)
    changes = [
        change(group, bootstraps.get(group["task"].iloc[0]))
        for _, group in pairs.groupby(list(SETTING), dropna=False, sort=False)
    ]
    changes.sort(key=lambda c: -len(c.flagged))  # stable: within it the report's order
    return Comparison(
        *names, commits(runs), commits(others), changes,
        len(runs) - pairs["run_id"].nunique(), len(others) - pairs["run_id_other"].nunique(),
    )  # fmt: skip


def paired_bootstrap(
    pairs: pd.DataFrame, problems: list[Problem]
) -> tuple[dict[str, int], Bootstrap] | None:
    """All predictions of both sides over their common examples.

    The rows are named by folder, because equal configurations have equal run ids.
    """
    columns = ["folder", "score", "method", "seed"]
    ours = pairs[columns].assign(run_id=pairs["folder"])
    other = pairs[["folder_other", "score_other", "method", "seed"]].set_axis(columns, axis=1)
    both = pd.concat([ours, other.assign(run_id=other["folder"])]).drop_duplicates("run_id")
    index, correct = align_examples(both, problems)
    return (index, Bootstrap(correct)) if index else None


def change(pairs: pd.DataFrame, bootstrap: tuple[dict[str, int], Bootstrap] | None) -> Change:
    figures = {}
    tested = bool((pairs["tested"] & pairs["tested_other"]).all())
    for name in FIGURES:
        column = "validation_score" if name == "score" and not tested else name
        ours, theirs = pairs[column].to_numpy(), pairs[f"{column}_other"].to_numpy()
        interval = seed_interval(ours - theirs)
        if column == "score" and bootstrap is not None:
            index, draws = bootstrap
            rows = [index[folder] for folder in pairs["folder"] if folder in index]
            others = [index[folder] for folder in pairs["folder_other"] if folder in index]
            if len(rows) == len(others) == len(pairs):
                interval = draws.difference(rows, others)
        figures[name] = Figure(float(ours.mean()), float(theirs.mean()), interval)
    first = pairs.iloc[0]
    return Change(
        first["task"], first["arm"], first["method"], first["learning_rate"], tested, len(pairs),
        figures,
    )  # fmt: skip


def commits(runs: pd.DataFrame) -> list[str]:
    """The short commits of the runs, marked if the working tree had changes."""
    found = []
    for text in runs["environment"].unique():
        environment = json.loads(text) or {}
        commit = environment.get("git_commit")
        changed = " with changes" if environment.get("git_dirty") else ""
        found.append(f"{commit[:10]}{changed}" if commit else "unknown")
    return sorted(set(found))
