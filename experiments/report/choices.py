"""The setting that each arm is judged at: its learning rate, and by what it was chosen.

A protocol's own choice comes first. Otherwise the learning rate of the highest mean validation
score is taken, and where no validation score was recorded that of the highest test score: then the
score shown was also what chose it, and is too high by what the best of several tries gains by luck.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from .palette import BASELINE

PROTOCOL, VALIDATION, TEST = "protocol", "validation score", "test score"


@dataclass(frozen=True)
class Choice:
    """One arm's chosen setting.

    Attributes:
        runs: the runs that it is judged by, one a seed.
        rates: how many learning rates there were to choose from.
        at_edge: whether the chosen rate is the lowest or the highest of several, and another did
            worse: the best may lie beyond.
        by: what chose it: "protocol", "validation score" or "test score".
    """

    task: str
    arm: str
    method: str
    is_control: bool
    rank: float
    learning_rate: float
    runs: tuple[str, ...]
    rates: int
    at_edge: bool
    by: str


def choose(runs: pd.DataFrame, selected: dict[Any, dict[str, Any]]) -> list[Choice]:
    """One choice per task and arm, in the order of the runs.

    Args:
        runs: the table of runs, with `task` and `arm`.
        selected: what a protocol chose; empty where there was none.
    """
    named = {str(run): told for told in selected.values() for run in told.get("runs") or []}
    choices = []
    for (task, arm), group in runs.groupby(["task", "arm"], sort=False):
        chosen = group[group["run_id"].isin(named)]
        if len(chosen):
            told = named[chosen["run_id"].iloc[0]]
            rate = chosen["learning_rate"].iloc[0]
            chosen = chosen[same(chosen["learning_rate"], rate)]
            by, edge = PROTOCOL, told.get("at_edge")
        elif selected:
            continue  # a protocol that chose nothing here: it is not done with this arm
        else:
            by, rate, others_are_worse = best_rate(group)
            chosen = group[same(group["learning_rate"], rate)]
            edge = None if others_are_worse else False
        rates = sorted(group["learning_rate"].dropna().unique())
        if edge is None:
            edge = len(rates) > 1 and rate in (rates[0], rates[-1])
        choices.append(
            Choice(
                task, arm, group["method"].iloc[0], bool(group["is_control"].iloc[0]),
                group["rank"].iloc[0], rate, tuple(chosen["run_id"]), len(rates),
                bool(edge), by,
            )
        )  # fmt: skip
    return choices


def at_equal_update(
    runs: pd.DataFrame, choices: list[Choice], matched: dict[Any, dict[str, Any]]
) -> list[Choice]:
    """Each arm at the rate at which its weights moved as far as the baseline's, and the baselines
    at their chosen ones; nothing where a protocol has not made this comparison."""
    found = choose(runs, matched) if matched else []
    arms = {choice.arm for choice in found}
    return [c for c in choices if found and c.arm not in arms and c.method == BASELINE] + found


def best_rate(arm: pd.DataFrame) -> tuple[str, float, bool]:
    """The criterion, the learning rate of its highest mean over seeds, and whether any other's is
    lower.

    Only rates that the most seeds finished at count: where some diverged, the mean over the rest
    flatters.
    """
    validated = arm["validation_score"].notna().all()
    column = "validation_score" if validated else "score"
    by_rate = arm.groupby("learning_rate", dropna=False)[column].agg(["mean", "count"])
    complete = by_rate[by_rate["count"] == by_rate["count"].max()]
    means = complete["mean"]
    return VALIDATION if validated else TEST, means.idxmax(), bool((means < means.max()).any())


def same(values: pd.Series, value: float) -> pd.Series:
    """Equality, with a missing learning rate equal to a missing one."""
    return values.isna() if value != value else values == value


def mark_best(runs: pd.DataFrame, choices: list[Choice]) -> pd.DataFrame:
    """Add the column `best`: whether a run is at its arm's chosen setting."""
    chosen = {(c.task, c.arm): c.learning_rate for c in choices}
    wanted = [chosen.get(key, float("inf")) for key in zip(runs["task"], runs["arm"], strict=True)]
    wanted = pd.Series(wanted, index=runs.index)
    rate = runs["learning_rate"]
    return runs.assign(best=(rate == wanted) | (rate.isna() & wanted.isna()))


def without_repeats(runs: pd.DataFrame) -> pd.DataFrame:
    """A protocol tests its chosen setting with runs that repeat those of its grid: of two runs of
    one setting and seed, the one that was tested stays if the other was not."""
    key = ["task", "arm", "learning_rate", "seed"]
    tested = runs.groupby(key, dropna=False)["tested"].transform("any")
    return runs[runs["tested"] | ~tested]


def with_kept_runs(choice: Choice, runs: pd.DataFrame) -> Choice:
    """The choice by the runs that are left without repeats: some were chosen by a repeat."""
    setting = runs[(runs["task"] == choice.task) & (runs["arm"] == choice.arm)]
    setting = setting[same(setting["learning_rate"], choice.learning_rate)]["run_id"]
    named = setting[setting.isin(choice.runs)]
    return replace(choice, runs=tuple(named if len(named) else setting))
