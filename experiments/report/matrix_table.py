"""The matrix of verdicts and the power of a sweep, as rows of text for every output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .cells import judged_text, plural, scientific, short_sentences, significant
from .judgement import NOT_RESOLVED, Judgement
from .matrix import Matrix
from .palette import BASELINE
from .power import POINTS, Power, size_text
from .quantities import SCORE, Quantity
from .summary import Row

UNSEEN = "?"  # "not resolved" in a terminal, whose legend says so
POWER_HEADERS = (
    "quantity", "seeds", "half-width", "resolved from", "SD shared", "SD seeds", "SD examples",
    "SD rest",
)  # fmt: skip
NEED_HEADERS = (
    "to resolve", "seeds, same examples", "hours", "examples, same seeds", "seeds and examples",
    "hours for both",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One arm in one quantity: the figure, its verdict, its interval, and what a tooltip adds."""

    text: str
    verdict: str
    interval: str = ""
    help: str = ""

    @property
    def whole(self) -> str:
        return " ".join(filter(None, (self.text, self.interval, self.verdict)))


def headers(matrix: Matrix, metric: str) -> list[str]:
    return ["method", *(heading(quantity, metric) for quantity in matrix.quantities)]


def heading(quantity: Quantity, metric: str) -> str:
    return metric if quantity == SCORE else quantity.short


def cells_of(row: Row, matrix: Matrix) -> list[Cell]:
    """A cell for each quantity; the baseline's are its means."""
    judged = matrix.at(row.choice.task, row.arm)
    found = []
    for quantity in matrix.quantities:
        if quantity.name in judged:
            found.append(cell(judged[quantity.name]))
        else:
            mean = matrix.means.get((row.choice.task, row.arm, quantity.name))
            found.append(Cell(mean_text(mean, quantity), "baseline" if row.is_baseline else ""))
    return found


def cell(one: Judgement) -> Cell:
    if one.quantity.name == "steps_to_baseline" and one.reason and math.isnan(one.value):
        return Cell("not reached", one.verdict, "", "a run did not reach the baseline's final loss")
    help = one.reason or (
        f"95 % interval over {one.covers}; p = {one.p:.2g} after Holm's correction; margin "
        f"{one.quantity.margin_text}"
    )
    figure, _, interval = judged_text(one).partition(" ")
    return Cell(figure, one.verdict, interval, help)


def mean_text(mean: float | None, quantity: Quantity) -> str:
    if mean is None or math.isnan(mean):
        return "—"
    if quantity == SCORE:
        return f"{100 * mean:.1f} %"
    return significant(mean) if quantity.ratio else f"{quantity.scale * mean:,.1f} {quantity.unit}"


def matrix_rows(rows: list[Row], matrix: Matrix, brief: bool = False) -> list[list[str]]:
    """The cells as text. `brief` has the verdicts only, for a terminal."""
    several = len({row.choice.task for row in rows}) > 1
    made = []
    for row in rows:
        found = cells_of(row, matrix)
        texts = [c.verdict.replace(NOT_RESOLVED, UNSEEN) if brief else c.whole for c in found]
        if brief and row.is_baseline:
            texts = [c.text for c in found]
        made.append([f"{row.arm} on {row.choice.task}" if several else row.arm, *texts])
    return made


def legend(matrix: Matrix) -> str:
    """What the verdicts mean, with each quantity's margin."""
    margins = [f"{q.short.replace('.', '')} {q.margin_text}" for q in matrix.quantities]
    return (
        f"Differences to {BASELINE}, paired over seeds, with 95 % intervals; residual variance "
        "pooled over methods. better, worse, larger, smaller: p < 0.05 after Holm’s correction "
        "over the methods. tie: the interval lies within the margin. not resolved: neither. "
        + short_sentences("Margins", margins)
    )


def power_rows(powers: list[Power], metric: str) -> list[list[str]]:
    """What the sweep resolves in each quantity."""
    several = len({power.task for power in powers}) > 1
    rows = []
    for power in powers:
        quantity, factor = power.quantity, power.factor
        name = metric if quantity == SCORE else quantity.label
        half = power.half_width(power.seeds)
        rows.append([
            f"{name} on {power.task}" if several else name, f"{power.seeds:g}",
            size_text(half, factor, quantity), power.least_text,
            *(deviation(v, power) for v in (power.shared, power.between_seeds,
                                            power.between_examples, power.rest)),
        ])  # fmt: skip
    return rows


def power_tables(
    powers: list[Power], metric: str
) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, headers and rows: what the sweep resolves, and what more of it would."""
    if not powers:
        return []
    tables = [("What this sweep resolves", POWER_HEADERS, power_rows(powers, metric))]
    for power in powers:
        if power.quantity == SCORE and math.isfinite(power.now):
            where = f"{metric} on {power.task}, {power.arms} arms"
            if power.examples:
                where += f", {plural(power.examples, 'held-out example')}"
            tables.append((f"What it would take: {where}", NEED_HEADERS, need_rows(power)))
    return tables


def deviation(variance: float, power: Power) -> str:
    """A standard deviation: in points for a score, in percent for a factor."""
    if not variance > 0:
        return "0" if variance == 0 else "—"
    value = math.sqrt(variance)
    if power.factor:
        return f"{100 * math.expm1(value):.2g} %"
    quantity = power.quantity
    if quantity.ratio:
        return scientific(value)
    return f"{quantity.scale * value:.2g} {quantity.unit}"


def need_rows(power: Power) -> list[list[str]]:
    """Seeds, examples and hours that would resolve 0.5, 1 and 2 points."""
    rows = []
    for difference in POINTS:
        seeds, examples = power.seeds_for(difference), power.examples_for(difference)
        both = power.both_for(difference)
        rows.append([
            plural_points(difference), number(seeds), hours(power.hours(seeds)),
            number(examples),
            "—" if both is None else f"{plural(both[0], 'seed')}, {both[1]:,} examples",
            hours(power.hours(both[0]) if both else math.nan),
        ])  # fmt: skip
    return rows


def plural_points(difference: float) -> str:
    points = 100 * difference
    return f"{points:g} point{'' if points == 1 else 's'}"


def number(count: int | None) -> str:
    return "no number" if count is None else f"{count:,}"


def hours(value: float) -> str:
    if math.isnan(value):
        return "—"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
