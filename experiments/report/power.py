"""What a sweep can resolve, and how many seeds and examples more would take.

The variances of a paired difference come from the runs at hand (see `pooled`). A difference counts
as resolved if four of five such sweeps would call it, after the strictest step of Holm's
correction:

    resolved(S, N) = (t(1 - 0.05 / (2 m)) + t(0.8)) sqrt(var(S, N))
    var(S, N) = v_seeds / S + v_examples / N + v_rest / (S N)

for `m` comparisons, `S` seeds, `N` examples and Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from .judgement import example_differences
from .matrix import Matrix, baseline_arms
from .pooled import Layout, example_parts
from .quantities import SCORE, Quantity
from .statistics import LEVEL
from .summary import Summarizer

CALLED = 0.8  # of sweeps with a resolved difference, the share that calls it
POINTS = (0.005, 0.01, 0.02)
MOST = 100_000  # seeds or examples to search


@dataclass(frozen=True)
class Power:
    """The variances of one quantity on one task. Factors are on logarithms.

    Attributes:
        arms: how many share the pooled variance.
        comparisons: that Holm's correction counts.
        seeds: of each arm at present, and `examples` (None if the quantity has none).
        shared: variance of a seed's shift of all arms, which pairing cancels.
        between_seeds, between_examples, rest: variances of a paired difference.
        seconds: of one run; NaN if it was not recorded.
    """

    quantity: Quantity
    task: str
    factor: bool
    arms: int
    comparisons: int
    seeds: float
    examples: int | None
    shared: float
    between_seeds: float
    between_examples: float
    rest: float
    seconds: float

    def error(self, seeds: float, examples: float | None) -> tuple[float, float]:
        """The standard error of a difference, and its degrees of freedom."""
        examples = examples or 1
        by_seed = (self.between_seeds + self.rest / examples) / seeds
        by_example = (self.between_examples + self.rest / seeds) / examples
        total = self.between_seeds / seeds + self.between_examples / examples
        total += self.rest / (seeds * examples)
        freedom = max((self.arms - 1) * (seeds - 1), 0.0)
        if total == 0 or freedom == 0:
            return np.sqrt(total), freedom
        spread = by_seed**2 / freedom + (by_example**2 / (examples - 1) if examples > 1 else 0.0)
        return float(np.sqrt(total)), float(total**2 / spread)

    def half_width(self, seeds: float, examples: float | None = None) -> float:
        """Half of the 95 % interval of a difference; NaN for one seed."""
        error, freedom = self.error(seeds, examples or self.examples)
        return float(stdtrit(freedom, 0.5 + LEVEL / 2)) * error if freedom else np.nan

    def least(self, seeds: float, examples: float | None = None) -> float:
        """The smallest difference that is resolved; NaN for one seed."""
        error, freedom = self.error(seeds, examples or self.examples)
        if not freedom:
            return np.nan
        tail = (1 - LEVEL) / (2 * self.comparisons)
        return float(stdtrit(freedom, 1 - tail) + stdtrit(freedom, CALLED)) * error

    @property
    def now(self) -> float:
        return self.least(self.seeds)

    @property
    def least_text(self) -> str:
        """The smallest difference that this sweep resolves."""
        return size_text(self.now, self.factor, self.quantity)

    def seeds_for(self, difference: float, examples: int | None = None) -> int | None:
        """The seeds that resolve a difference; None if no number does."""
        return smallest(lambda count: self.least(count, examples), difference, first=2)

    def examples_for(self, difference: float) -> int | None:
        """The held-out examples that resolve a difference with the present seeds."""
        if self.examples is None:
            return None
        return smallest(lambda count: self.least(self.seeds, count), difference, first=2)

    def both_for(self, difference: float) -> tuple[int, int] | None:
        """Seeds and examples that resolve a difference: examples take up half of the variance."""
        if self.examples is None:
            return None
        alone = replace(self, between_seeds=0.0, rest=0.0)
        wide = difference / np.sqrt(2)
        needed = smallest(lambda count: alone.least(1000, count), wide, first=2)
        if needed is None:
            return None
        needed = max(needed, self.examples)
        seeds = self.seeds_for(difference, needed)
        return (seeds, needed) if seeds else None

    def hours(self, seeds: int | None) -> float:
        """Hours to train all arms with this many seeds, one run after the other."""
        return np.nan if seeds is None else seeds * self.arms * self.seconds / 3600


def smallest(least, difference: float, first: int) -> int | None:
    """The smallest count whose resolved difference is at most `difference`, by bisection."""
    if not least(MOST) <= difference:
        return None
    low, high = first, MOST
    while low < high:
        middle = (low + high) // 2
        if least(middle) <= difference:
            high = middle
        else:
            low = middle + 1
    return low


def size_text(value: float, factor: bool, quantity: Quantity) -> str:
    """A smallest difference as text: "3.1 points", "12 %"."""
    if np.isnan(value):
        return "unknown: one seed"
    if factor:
        share = 100 * np.expm1(value)
        return f"{share:.2g} %" if share < 100 else f"a factor of {np.exp(value):.2g}"
    if quantity.ratio:
        return f"{value:.2g}"
    return f"{quantity.scale * value:.1f} {quantity.unit}"


def powers(matrix: Matrix, summarizer: Summarizer) -> list[Power]:
    """One for each task and each quantity that is judged there."""
    found = []
    for task, table in matrix.values.items():
        pairs = baseline_arms([c for c in summarizer.choices if c.task == task])
        for quantity in matrix.quantities:
            mine = [one for one in matrix.of(quantity) if one.task == task and not one.reason]
            known = table[np.isfinite(table[quantity.name])]
            if not mine:
                continue
            values = known[quantity.name].to_numpy()
            values = np.log(values) if mine[0].factor else values
            layout = Layout(known["arm"].tolist(), known["seed"].tolist(), values)
            answers = summarizer.answers(task) if quantity == SCORE else {}
            examples, seeds_part, examples_part, rest = parts(layout, pairs, answers)
            seconds = table[["wall_seconds", "train_seconds"]].max(axis=1).mean()
            compared = sum(np.isfinite(one.p) for one in matrix.of(quantity))
            found.append(Power(
                quantity, task, mine[0].factor, len(layout.places), compared,
                float(known.groupby("arm")["seed"].nunique().median()), examples,
                layout.shared, seeds_part, examples_part, rest, float(seconds),
            ))  # fmt: skip
    return found


def parts(
    layout: Layout, pairs: dict[str, str], answers: dict[tuple[str, int], np.ndarray]
) -> tuple[int | None, float, float, float]:
    """The number of examples, and the variances between seeds, between examples and of the rest."""
    found = []
    for arm, baseline in pairs.items():
        difference = example_differences(arm, baseline, answers)
        if difference is not None:
            found.append((len(difference), difference.shape[1], *example_parts(difference)))
    if not found:
        return None, 2 * layout.variance, 0.0, 0.0
    seeds, counts, over, rests = (np.array(column) for column in zip(*found, strict=True))
    examples, rest = int(counts[0]), float(rests.mean())
    between_examples = max(float((over - rests / seeds).mean()), 0.0)
    return examples, max(2 * layout.variance - rest / examples, 0.0), between_examples, rest


def curve(power: Power, most: int = 32) -> pd.DataFrame:
    """Half-widths for two seeds up to a few times the present ones, the present sweep marked."""
    last = int(min(max(4 * power.seeds, 12), max(most, power.seeds)))
    counts = list(range(2, last + 1))
    rows = [
        {
            "quantity": power.quantity.name, "task": power.task, "seeds": count,
            "half_width": shown(power, power.half_width(count)),
            "least": shown(power, power.least(count)), "present": count == round(power.seeds),
        }
        for count in counts
    ]  # fmt: skip
    return pd.DataFrame(rows)


def shown(power: Power, value: float) -> float:
    """In the quantity's unit, in percent of the baseline's value for a factor."""
    if power.factor:
        return 100 * float(np.expm1(value))
    return power.quantity.scale * value
