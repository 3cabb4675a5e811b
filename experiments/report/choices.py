"""The setting at which each arm is compared: its learning rate, and how it was chosen.

A protocol's choice comes first. Otherwise the learning rate with the highest mean validation score
is chosen. Without validation scores it is the one with the highest test score. The test score is
then too high, because it is the best of several.
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
        runs: the runs at this setting, one per seed.
        rates: the number of learning rates to choose from.
        at_edge: whether the chosen rate is the lowest or the highest of several, and another rate
            was worse. The best may then lie beyond.
        by: the criterion: "protocol", "validation score" or "test score".
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
        selected: what a protocol chose; empty without a protocol.
    """
    named = {str(run): one for one in selected.values() for run in one.get("runs") or []}
    choices = []
    for (task, arm), group in runs.groupby(["task", "arm"], sort=False):
        chosen = group[group["run_id"].isin(named)]
        if len(chosen):
            recorded = named[chosen["run_id"].iloc[0]]
            rate = chosen["learning_rate"].iloc[0]
            chosen = chosen[same(chosen["learning_rate"], rate)]
            by, edge = PROTOCOL, recorded.get("at_edge")
        elif selected:
            continue  # the protocol has not finished this arm
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
    """Each arm at the rate at which its weights moved as far as the baseline's.

    The baselines are at their chosen rates. The list is empty if no protocol compared this.
    """
    found = choose(runs, matched) if matched else []
    arms = {choice.arm for choice in found}
    return [c for c in choices if found and c.arm not in arms and c.method == BASELINE] + found


def best_rate(arm: pd.DataFrame) -> tuple[str, float, bool]:
    """The criterion, the learning rate with its highest mean, and whether another mean is lower.

    Only rates with the most finished seeds count: if seeds diverged, the mean over the others is
    too high.
    """
    validated = arm["validation_score"].notna().all()
    column = "validation_score" if validated else "score"
    by_rate = arm.groupby("learning_rate", dropna=False)[column].agg(["mean", "count"])
    complete = by_rate[by_rate["count"] == by_rate["count"].max()]
    means = complete["mean"]
    return VALIDATION if validated else TEST, means.idxmax(), bool((means < means.max()).any())


def same(values: pd.Series, value: float) -> pd.Series:
    """Equality in which a missing learning rate equals a missing one."""
    return values.isna() if value != value else values == value


def mark_best(runs: pd.DataFrame, choices: list[Choice]) -> pd.DataFrame:
    """Add the column `best`: whether a run is at its arm's chosen setting."""
    chosen = {(c.task, c.arm): c.learning_rate for c in choices}
    wanted = [chosen.get(key, float("inf")) for key in zip(runs["task"], runs["arm"], strict=True)]
    wanted = pd.Series(wanted, index=runs.index)
    rate = runs["learning_rate"]
    return runs.assign(best=(rate == wanted) | (rate.isna() & wanted.isna()))


def without_repeats(runs: pd.DataFrame) -> pd.DataFrame:
    """Drop runs without a test score if a tested run of the same setting and seed exists.

    A protocol tests its chosen setting with new runs of settings of its grid.
    """
    key = ["task", "arm", "learning_rate", "seed"]
    tested = runs.groupby(key, dropna=False)["tested"].transform("any")
    return runs[runs["tested"] | ~tested]


def with_kept_runs(choice: Choice, runs: pd.DataFrame) -> Choice:
    """The choice with its runs that are left after `without_repeats`."""
    setting = runs[(runs["task"] == choice.task) & (runs["arm"] == choice.arm)]
    setting = setting[same(setting["learning_rate"], choice.learning_rate)]["run_id"]
    named = setting[setting.isin(choice.runs)]
    return replace(choice, runs=tuple(named if len(named) else setting))
