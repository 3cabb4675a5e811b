"""What the runs say about one quantity of one arm, compared with its baseline.

There are four verdicts on a difference:

- tie: its 95 % interval lies within the quantity's margin. The two are equal for all purposes.
- better or worse: it is not a tie, and its p-value stays below 5 % after Holm's correction for the
  comparisons of the quantity. A quantity without a good direction is larger or smaller instead.
- not resolved: none of these. The runs cannot tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .pooled import Estimate, Layout, holm, with_examples
from .quantities import LOWER, NEITHER, Quantity
from .statistics import LEVEL

BETTER, WORSE, LARGER, SMALLER = "better", "worse", "larger", "smaller"
TIE, NOT_RESOLVED = "tie", "not resolved"
DIFFERENT = (BETTER, WORSE, LARGER, SMALLER)
EXAMPLES_TOO, SEEDS_ALONE = "examples and seeds", "seeds alone"
NOTHING = Estimate(np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class Judgement:
    """One arm's difference to its baseline in one quantity, and the verdict.

    Attributes:
        value, low, high: the difference with its 95 % interval, or the factor if `factor`.
        p: after Holm's correction; NaN if there is none.
        covers: what the interval covers, "examples and seeds" or "seeds alone".
        reason: why there is no verdict; empty if the interval says it.
        margin: in the unit of `value` (as a share for a factor).
    """

    quantity: Quantity
    task: str
    arm: str
    baseline: str
    value: float
    low: float
    high: float
    p: float
    verdict: str
    factor: bool
    covers: str
    margin: float
    reason: str = ""

    @property
    def differs(self) -> bool:
        return self.verdict in DIFFERENT


def judge(
    arms: Sequence[str],
    seeds: Sequence[int],
    values: Sequence[float],
    quantity: Quantity,
    baselines: dict[str, str],
    correct: dict[tuple[str, int], np.ndarray] | None = None,
    task: str = "",
) -> list[Judgement]:
    """Judge the arms of one task in one quantity, before Holm's correction (`corrected`).

    Args:
        arms, seeds, values: of each run. Values that are not finite are left out.
        baselines: the baseline's arm of each arm to judge.
        correct: by arm and seed, whether each example was answered correctly, on one common set
            of examples. The intervals then cover the choice of examples.
    """
    numbers = np.asarray(values, dtype=float)
    known = np.isfinite(numbers)
    arms = [arm for arm, keep in zip(arms, known, strict=True) if keep]
    seeds = [seed for seed, keep in zip(seeds, known, strict=True) if keep]
    numbers = numbers[known]
    factor = quantity.ratio and len(numbers) > 0 and bool((numbers > 0).all())
    constant = len(numbers) > 1 and bool((numbers == numbers[0]).all())
    layout = Layout(arms, seeds, np.log(numbers) if factor else numbers) if arms else None
    present = set(arms)
    made = []
    for arm, baseline in baselines.items():
        missing = [name for name in (arm, baseline) if name not in present]
        found, covers, reason = NOTHING, SEEDS_ALONE, ""
        if layout is None or missing:
            reason = f"no run of {' or '.join(missing)} has it"
        else:
            found = layout.difference(arm, baseline)
            if constant:
                reason = "every run has the same value"
            elif layout.freedom == 0:
                reason = "one run per method: the variance between seeds is unknown"
            elif not np.isfinite(found.error):
                reason = "no common seed joins the two"
            elif (pairs := example_differences(arm, baseline, correct or {})) is not None:
                found, covers = with_examples(found, pairs), EXAMPLES_TOO
        margin = quantity.margin
        if quantity.ratio and not factor and baseline in present:
            margin *= float(abs(numbers[[arm == baseline for arm in arms]].mean()))
        place = (quantity, task, arm, baseline)
        made.append(first_verdict(place, found, factor, covers, margin, reason))
    return made


def example_differences(
    arm: str, baseline: str, correct: dict[tuple[str, int], np.ndarray]
) -> np.ndarray | None:
    """The difference on each common seed and example; None without common predictions."""
    seeds = [seed for name, seed in correct if name == arm and (baseline, seed) in correct]
    if not seeds:
        return None
    ours, theirs = (np.stack([correct[name, s] for s in seeds]) for name in (arm, baseline))
    return ours.astype(float) - theirs


def first_verdict(
    place: tuple[Quantity, str, str, str],
    found: Estimate,
    factor: bool,
    covers: str,
    margin: float,
    reason: str,
) -> Judgement:
    """A tie or not; whether it is a difference, Holm's correction decides.

    Args:
        place: quantity, task, arm and baseline.
        found: on logarithms if `factor`.
        reason: why there is no verdict.
    """
    half = np.nan if reason else found.half_width
    value, low, high = found.value, found.value - half, found.value + half
    inside = not reason and within(low, high, margin, factor)
    if factor:
        with np.errstate(over="ignore"):
            value, low, high = (float(np.exp(end)) for end in (value, low, high))
    return Judgement(
        *place, value, low, high, np.nan if reason else found.p, TIE if inside else NOT_RESOLVED,
        factor, covers, margin, reason,
    )  # fmt: skip


def within(low: float, high: float, margin: float, factor: bool) -> bool:
    """Whether an interval lies inside the margin on both sides; a factor's on logarithms."""
    limit = np.log1p(margin) if factor else margin
    return bool(-limit < low and high < limit)


def corrected(judgements: list[Judgement]) -> list[Judgement]:
    """Holm's correction over the comparisons of one quantity, and the verdicts that follow."""
    compared = [one for one in judgements if np.isfinite(one.p)]
    adjusted = iter(holm([one.p for one in compared]))
    made = []
    for one in judgements:
        if np.isfinite(one.p):
            one = replace(one, p=next(adjusted))
            if one.verdict != TIE and one.p < 1 - LEVEL:
                one = replace(one, verdict=direction(one))
        made.append(one)
    return made


def direction(one: Judgement) -> str:
    above = one.value > (1.0 if one.factor else 0.0)
    if one.quantity.better == NEITHER:
        return LARGER if above else SMALLER
    return WORSE if above == (one.quantity.better == LOWER) else BETTER
