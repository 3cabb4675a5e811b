"""What a sweep resolves, and what more seeds and examples would, as tables."""

from __future__ import annotations

import math

from .cells import number, plural
from .power import POINTS, Power, size_text
from .quantities import SCORE
from .table import Table

ROUNDING = 1e-9  # logarithms and shares whose deviation is smaller are equal
POWER_HEADERS = (
    "quantity", "seeds", "half-width", "resolved from", "SD shared", "SD seeds", "SD examples",
    "SD rest",
)  # fmt: skip
NEED_HEADERS = (
    "to resolve", "seeds, same examples", "hours", "examples, same seeds", "seeds and examples",
    "hours for both",
)  # fmt: skip


def power_tables(powers: list[Power], metric: str) -> list[Table]:
    """What the sweep resolves in each quantity, and for each task what the score would take."""
    if not powers:
        return []
    several = len({power.task for power in powers}) > 1
    rows = []
    for power in powers:
        name = metric if power.quantity == SCORE else power.quantity.label
        parts = (power.shared, power.between_seeds, power.between_examples, power.rest)
        rows.append([
            f"{name} on {power.task}" if several else name, f"{power.seeds:g}",
            size_text(power.half_width(power.seeds), power.factor, power.quantity),
            power.least_text, *(deviation(part, power) for part in parts),
        ])  # fmt: skip
    tables = [Table("What this sweep resolves", POWER_HEADERS, rows)]
    for power in powers:
        if power.quantity == SCORE and math.isfinite(power.now):
            where = f"{metric} on {power.task}, {power.arms} arms"
            if power.examples:
                where += f", {plural(power.examples, 'held-out example')}"
            tables.append(Table(f"What it would take: {where}", NEED_HEADERS, need_rows(power)))
    return tables


def deviation(variance: float, power: Power) -> str:
    """A standard deviation: in percent for a factor, else in the quantity's unit."""
    if math.isnan(variance):
        return "—"
    value = math.sqrt(variance)
    if value < ROUNDING:
        return "0"
    if power.factor:
        return f"{100 * math.expm1(value):.2g} %"
    return f"{power.quantity.scale * value:.2g} {power.quantity.unit}".strip()


def need_rows(power: Power) -> list[list[str]]:
    """Seeds, examples and hours that would resolve 0.5, 1 and 2 points."""
    rows = []
    for difference in POINTS:
        seeds, examples = power.seeds_for(difference), power.examples_for(difference)
        both = power.both_for(difference)
        rows.append([
            f"{100 * difference:g} point{'' if difference == 0.01 else 's'}",
            "no number" if seeds is None else f"{seeds:,}", number(power.hours(seeds)),
            "no number" if examples is None else f"{examples:,}",
            "—" if both is None else f"{plural(both[0], 'seed')}, {both[1]:,} examples",
            number(power.hours(both[0] if both else None)),
        ])  # fmt: skip
    return rows
