"""One row per arm at its chosen setting: every measure with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .choices import Choice
from .palette import BASELINE, ordered
from .runs import Problem, read_predictions
from .statistics import LEAST_SEEDS, Bootstrap, Interval, seed_interval

BOTH, SEEDS, NONE = "examples and seeds", "seeds alone", "no interval"


@dataclass(frozen=True)
class Row:
    """Means over the seeds of one arm. An interval's ends are NaN where there is none.

    Attributes:
        interval: what the score's interval covers: "examples and seeds", "seeds alone" or
            "no interval".
        measures: the means of all other measures by name; NaN if no run has one. The output gap is
            the largest over seeds.
    """

    choice: Choice
    seeds: tuple[int, ...]
    score: Interval
    interval: str
    measures: dict[str, float]

    @property
    def arm(self) -> str:
        return self.choice.arm

    @property
    def method(self) -> str:
        return self.choice.method

    @property
    def is_baseline(self) -> bool:
        return self.method == BASELINE

    def get(self, name: str) -> float | None:
        """The mean of a measure; None if no run has it."""
        value = self.measures[name]
        return None if np.isnan(value) else value


MEANS = (
    "init_seconds", "trainable_parameters", "first_step_gradient_norm", "update_size", "forgetting",
)  # fmt: skip


class Summarizer:
    """Rows of every task, all from the same bootstrap draws per task.

    Args:
        runs: the table of runs.
        choices: the settings to summarize. Only the predictions of their runs are read.

    Attributes:
        quantity: "score", or "validation_score" if a chosen run has no test score.
    """

    def __init__(self, runs: pd.DataFrame, choices: list[Choice], draws: int = 2000) -> None:
        named = [run for choice in choices for run in choice.runs]
        self.costs = computed_costs(runs)
        self.runs = runs.set_index("run_id", drop=False).loc[named]
        self.choices = choices
        self.seeds = sorted({int(seed) for seed in self.runs["seed"]})
        self.quantity = "score" if self.runs["tested"].all() else "validation_score"
        self.problems: list[Problem] = []
        self.index: dict[str, int] = {}
        self.correct: dict[str, np.ndarray] = {}
        self.bootstraps: dict[str, Bootstrap] = {}
        for task, group in self.runs.groupby("task") if self.quantity == "score" else ():
            index, correct = align_examples(group, self.problems)
            self.index |= index
            if index:
                self.correct |= dict(zip(index, correct, strict=True))
                self.bootstraps[task] = Bootstrap(correct, draws)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(choice.task for choice in self.choices))

    def rows(self, task: str) -> list[Row]:
        """The rows of one task in the report's order: methods, then ranks, then names."""
        order = ordered({choice.method for choice in self.choices})
        chosen = [choice for choice in self.choices if choice.task == task]
        chosen.sort(key=lambda c: (order.index(c.method), c.rank, c.arm))
        return [self._row(choice, self.runs.loc[list(choice.runs)]) for choice in chosen]

    def all_rows(self) -> list[Row]:
        """The rows of all tasks, one task after the other."""
        return [row for task in self.tasks for row in self.rows(task)]

    def answers(self, task: str) -> dict[tuple[str, int], np.ndarray]:
        """By arm and seed, whether each common example was answered correctly.

        Empty if a run of the task has no predictions.
        """
        runs = self.runs[self.runs["task"] == task]
        if not set(runs["run_id"]) <= self.correct.keys():
            return {}
        named = runs[["arm", "seed", "run_id"]].itertuples(index=False)
        return {(arm, seed): self.correct[run] for arm, seed, run in named}

    def _row(self, choice: Choice, runs: pd.DataFrame) -> Row:
        mine = runs.sort_values("seed")
        score, kind = self._score(mine)
        measures = {key: float(mine[key].mean()) for key in MEANS}
        measures["output_gap"] = float(mine["output_gap"].max())
        computed = self.costs.get((choice.task, choice.arm))
        if computed is not None:
            measures["init_seconds"] = computed
        seeds = tuple(int(seed) for seed in mine["seed"])
        return Row(choice, seeds, score, kind, measures)

    def _score(self, runs: pd.DataFrame) -> tuple[Interval, str]:
        """By bootstrap if all predictions are available, else by Student's t."""
        rows = [self.index[run] for run in runs["run_id"] if run in self.index]
        if len(rows) == len(runs):
            return self.bootstraps[runs["task"].iloc[0]].score(rows), BOTH
        values = runs[self.quantity].to_numpy()
        return seed_interval(values), SEEDS if len(values) >= LEAST_SEEDS else NONE


def computed_costs(runs: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Seconds to initialize, by task and arm, for arms with runs that used the cache.

    They are those of the longest run, which computed what the others loaded.
    """
    arms = runs.groupby(["task", "arm"])
    cached = arms["from_cache"].any()
    return arms["init_seconds"].max()[cached].to_dict()


def baseline_of(choice: Choice, choices: list[Choice]) -> Choice | None:
    """The baseline's arm at the same settings, else the one at the same rank, else the only one."""
    same_name = BASELINE + choice.arm[len(choice.method) :]
    baselines = [c for c in choices if c.method == BASELINE]
    for candidates in (
        [c for c in baselines if c.arm == same_name],
        [c for c in baselines if c.rank == choice.rank],
        baselines,
    ):
        if len(candidates) == 1:
            return candidates[0]
    return None


def align_examples(
    runs: pd.DataFrame, problems: list[Problem]
) -> tuple[dict[str, int], np.ndarray]:
    """Stack the predictions of the runs of one task over their common examples.

    Args:
        problems: what is left out is added to it.

    Returns:
        The row of each run id, and the matrix `(runs, examples)`.
    """
    predicted = {}
    for run in runs.itertuples():
        try:
            predicted[run.run_id] = read_predictions(Path(run.folder), run.score)
        except (OSError, ValueError, KeyError, TypeError) as error:
            label = f"{run.method}, seed {run.seed} ({run.run_id})"
            reason = f"predictions.npz cannot be read: {error}"
            problems.append(Problem(label, reason, fatal=False))
    if not predicted:
        return {}, np.zeros((0, 0), dtype=bool)
    sets = [ids for ids, _ in predicted.values()]
    common = sets[0]
    for ids in sets[1:]:
        if not np.array_equal(common, ids):
            common = np.intersect1d(common, ids)
    largest = max(map(len, sets))
    if len(common) < largest:
        reason = f"the runs share {len(common)} of up to {largest} examples: " + (
            "intervals use those" if len(common) else "intervals do not cover examples"
        )
        problems.append(Problem("held-out examples", reason, fatal=False))
    if len(common) == 0:
        return {}, np.zeros((0, 0), dtype=bool)
    rows = [correct[np.searchsorted(ids, common)] for ids, correct in predicted.values()]
    return {run: i for i, run in enumerate(predicted)}, np.stack(rows)
