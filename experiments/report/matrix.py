"""Every quantity of every arm compared with the baseline: what the report leads with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from .choices import Choice
from .judgement import Judgement, corrected, judge
from .quantities import QUANTITIES, SCORE, Quantity
from .summary import Summarizer, baseline_of

CURVE = 3  # validation losses of a run that make a curve


@dataclass(frozen=True)
class Matrix:
    """The judgements of all tasks.

    Attributes:
        judgements: of the quantities that at least one run has.
        absent: quantities that no run has.
        means: the baseline's mean by task, baseline's arm and quantity's name.
        values: by task, the table of runs with a column for each quantity.
    """

    judgements: list[Judgement]
    absent: list[Quantity] = field(default_factory=list)
    means: dict[tuple[str, str, str], float] = field(default_factory=dict)
    values: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def quantities(self) -> list[Quantity]:
        """Those that are judged, in the report's order."""
        return list(dict.fromkeys(one.quantity for one in self.judgements))

    def of(self, quantity: Quantity) -> list[Judgement]:
        return [one for one in self.judgements if one.quantity == quantity]

    def at(self, task: str, arm: str) -> dict[str, Judgement]:
        """One arm's judgements by the quantity's name."""
        return {
            one.quantity.name: one for one in self.judgements if (one.task, one.arm) == (task, arm)
        }


def make_matrix(
    summarizer: Summarizer, metrics: pd.DataFrame, quantities: tuple[Quantity, ...] = QUANTITIES
) -> Matrix:
    """Judge the chosen settings of all tasks. Holm's correction is made for each quantity.

    Args:
        metrics: the logged rows of all runs, for the validation losses.
    """
    losses = validation_losses(metrics, summarizer.runs)
    values, judgements, means = {}, {quantity: [] for quantity in quantities}, {}
    for task in summarizer.tasks:
        chosen = [choice for choice in summarizer.choices if choice.task == task]
        baselines = baseline_arms(chosen)
        runs = summarizer.runs[summarizer.runs["task"] == task]
        values[task] = measured(runs, losses, baselines, summarizer.quantity)
        for quantity in quantities:
            if not values[task][quantity.name].notna().any():
                continue
            of_baselines = values[task][values[task]["arm"].isin(baselines.values())]
            for arm, mean in of_baselines.groupby("arm")[quantity.name].mean().items():
                means[task, arm, quantity.name] = float(mean)
            judgements[quantity] += judge(
                values[task]["arm"].tolist(), values[task]["seed"].tolist(),
                values[task][quantity.name].to_numpy(), quantity, baselines,
                summarizer.answers(task) if quantity == SCORE else None, task,
            )  # fmt: skip
    seen = [q for q in quantities if any(table[q.name].notna().any() for table in values.values())]
    found = [one for quantity in seen for one in corrected(judgements[quantity])]
    return Matrix(found, [q for q in quantities if q not in seen], means, values)


def baseline_arms(choices: list[Choice]) -> dict[str, str]:
    """The baseline's arm of each other arm that has one."""
    pairs = {choice.arm: baseline_of(choice, choices) for choice in choices}
    return {arm: base.arm for arm, base in pairs.items() if base is not None and base.arm != arm}


def measured(
    runs: pd.DataFrame, losses: dict[str, pd.Series], baselines: dict[str, str], score: str
) -> pd.DataFrame:
    """The runs of one task with a column for each quantity; NaN where a run does not have it.

    Args:
        losses: by run, the validation loss by step.
        score: the column that holds the score.
    """
    curves = {run: losses[run] for run in runs["run_id"] if run in losses}
    common = set.intersection(*(set(curve.index) for curve in curves.values())) if curves else set()
    last = max(common, default=None)
    final = {run: curve[last] for run, curve in curves.items()} if last is not None else {}
    by_arm = runs.set_index(["arm", "seed"])["run_id"]
    by_arm = by_arm[~by_arm.index.duplicated()].to_dict()
    steps = {}
    for run, arm, seed in runs[["run_id", "arm", "seed"]].itertuples(index=False):
        target = final.get(by_arm.get((baselines.get(arm, arm), seed)))
        if run in curves and target is not None and len(curves[run]) >= CURVE:
            steps[run] = first_step_below(curves[run], target)
    unknown = [q.name for q in QUANTITIES if q.name not in runs]
    # Of an arm that did not always get there, the runs that did would look too fast.
    names = zip(runs["run_id"], runs["arm"], strict=True)
    slow = {arm for run, arm in names if np.isnan(steps.get(run, 0.0))}
    return runs.reindex(columns=[*runs, *unknown]).assign(
        score=runs[score],
        validation_loss=runs["run_id"].map(final).astype(float),
        steps_to_baseline=runs["run_id"].map(steps).astype(float).where(~runs["arm"].isin(slow)),
        # A start that was loaded from the cache was not computed.
        init_seconds=runs["init_seconds"].where(~runs["from_cache"].astype(bool)),
    )


def validation_losses(metrics: pd.DataFrame, chosen: pd.DataFrame) -> dict[str, pd.Series]:
    """By run, the validation loss by step."""
    if metrics.empty or "loss" not in metrics:
        return {}
    rows = metrics[metrics["run_id"].isin(chosen["run_id"])]
    rows = rows[(rows["split"] == "validation") & rows["loss"].notna()].sort_values("step")
    rows = rows.drop_duplicates(["run_id", "step"], keep="last")
    return {str(run): one.set_index("step")["loss"] for run, one in rows.groupby("run_id")}


def first_step_below(curve: pd.Series, target: float) -> float:
    """The first step at which the loss is at most `target`, interpolated linearly; else NaN."""
    steps, values = curve.index.to_numpy(dtype=float), curve.to_numpy(dtype=float)
    reached = np.flatnonzero(values <= target)
    if not len(reached):
        return np.nan
    place = int(reached[0])
    if place == 0:
        return steps[0]
    share = (values[place - 1] - target) / (values[place - 1] - values[place])
    return float(steps[place - 1] + share * (steps[place] - steps[place - 1]))
