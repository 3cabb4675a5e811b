"""One row per arm (a method at one setting): score, interval, paired difference, cost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .palette import ordered
from .runs import Problem, Run
from .statistics import Bootstrap, Interval

BASELINE = "kaiming"
MAX_SEEDS_FOR_ALL_SUBSETS = 4


@dataclass(frozen=True)
class Row:
    """Means over the seeds of one arm. `score.low` is NaN where no interval could be made."""

    arm: str
    method: str
    seeds: tuple[int, ...]
    score: Interval
    difference: Interval | None
    output_gap: float | None
    output_gap_kl: float | None
    init_seconds: float | None
    calibration_seconds: float | None
    trainable_parameters: float | None
    first_step_gradient_norm: float | None

    @property
    def is_baseline(self) -> bool:
        return self.method == BASELINE

    @property
    def verdict(self) -> str:
        """`baseline`, `tie` (zero lies within the paired interval), `above`, `below` or `—`."""
        if self.is_baseline:
            return "baseline"
        if self.difference is None:
            return "—"
        if self.difference.contains_zero:
            return "tie"
        return "above" if self.difference.estimate > 0 else "below"


class Summarizer:
    """Rows for any choice of seeds, all from one set of bootstrap draws."""

    def __init__(self, runs: list[Run], arms: dict[str, str], draws: int = 2000) -> None:
        self.runs, self.arms = runs, arms
        self.seeds = sorted({run.seed for run in runs})
        self.index, correct, self.problems = align_examples(runs)
        self.bootstrap = Bootstrap(correct, draws) if len(correct) else None

    def rows(self, seeds: tuple[int, ...] | None = None) -> list[Row]:
        chosen = [run for run in self.runs if seeds is None or run.seed in seeds]
        by_arm: dict[str, list[Run]] = {}
        for method in ordered({run.method for run in chosen}):
            for run in sorted(chosen, key=lambda run: (self.arms[run.run_id], run.seed)):
                if run.method == method:
                    by_arm.setdefault(self.arms[run.run_id], []).append(run)
        return [self._row(arm, runs, self._baseline(arm, by_arm)) for arm, runs in by_arm.items()]

    def seed_subsets(self) -> list[tuple[int, ...]]:
        """Every choice of seeds if they are few, else each one alone and all together."""
        count = len(self.seeds)
        sizes = range(1, count + 1) if count <= MAX_SEEDS_FOR_ALL_SUBSETS else (1, count)
        return [subset for size in sizes for subset in combinations(self.seeds, size)]

    def _baseline(self, arm: str, by_arm: dict[str, list[Run]]) -> list[Run] | None:
        """The baseline at the same settings, or the only one there is."""
        same = BASELINE + arm[len(by_arm[arm][0].method) :]
        candidates = [a for a, runs in by_arm.items() if runs[0].method == BASELINE]
        if same in candidates:
            return by_arm[same]
        return by_arm[candidates[0]] if len(candidates) == 1 else None

    def _row(self, arm: str, runs: list[Run], baseline: list[Run] | None) -> Row:
        indices = [self.index.get(run.run_id) for run in runs]
        if self.bootstrap is None or None in indices:
            score = Interval(float(np.mean([run.score for run in runs])), np.nan, np.nan)
        else:
            score = self.bootstrap.score(indices)
        gaps = [run.result.get("output_gap") or {} for run in runs]
        result = {
            key: mean([run.result.get(key) for run in runs])
            for key in (
                "init_seconds",
                "calibration_seconds",
                "trainable_parameters",
                "first_step_gradient_norm",
            )
        }
        return Row(
            arm=arm,
            method=runs[0].method,
            seeds=tuple(run.seed for run in runs),
            score=score,
            difference=self._difference(runs, baseline),
            output_gap=largest([gap.get("max_abs_logit") for gap in gaps]),
            output_gap_kl=largest([gap.get("kl") for gap in gaps]),
            **result,
        )

    def _difference(self, runs: list[Run], baseline: list[Run] | None) -> Interval | None:
        if self.bootstrap is None or baseline is None or runs[0].method == BASELINE:
            return None
        by_seed = {run.seed: self.index.get(run.run_id) for run in baseline}
        pairs = [(self.index.get(run.run_id), by_seed.get(run.seed)) for run in runs]
        pairs = [pair for pair in pairs if None not in pair]
        if not pairs:
            return None
        mine, theirs = zip(*pairs, strict=True)
        return self.bootstrap.difference(list(mine), list(theirs))


def align_examples(runs: list[Run]) -> tuple[dict[str, int], np.ndarray, list[Problem]]:
    """Stack the predictions of all runs over the examples that they share.

    Returns:
        Row of each run id, the matrix `(runs, examples)`, and what had to be left out.
    """
    predicted = [run for run in runs if run.correct is not None]
    if not predicted:
        return {}, np.zeros((0, 0), dtype=bool), []
    common = predicted[0].example_ids
    for run in predicted[1:]:
        if not np.array_equal(common, run.example_ids):
            common = np.intersect1d(common, run.example_ids)
    problems = []
    largest_set = max(len(run.example_ids) for run in predicted)
    if len(common) < largest_set:
        problems.append(
            Problem(
                "held-out examples",
                f"the runs share {len(common)} of up to {largest_set} examples: "
                + ("intervals use those" if len(common) else "no intervals can be made"),
                fatal=False,
            )
        )
    if len(common) == 0:
        return {}, np.zeros((0, 0), dtype=bool), problems
    rows = [run.correct[np.searchsorted(run.example_ids, common)] for run in predicted]
    return {run.run_id: i for i, run in enumerate(predicted)}, np.stack(rows), problems


def mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def largest(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.max(present)) if present else None
