"""The matrix of verdicts as cells and as a table of text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .cells import judged_text, number, short_sentences
from .judgement import NOT_RESOLVED, Judgement
from .matrix import Matrix
from .palette import BASELINE
from .quantities import SCORE, Quantity
from .summary import Row
from .table import Table

TITLE = f"Compared with {BASELINE}"
UNSEEN = "?"  # "not resolved" in a terminal, whose legend says so


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
    """The heading of each column; the score has the name of its metric."""
    return ["method", *(metric if q == SCORE else q.short for q in matrix.quantities)]


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
    if mean is None or math.isnan(mean) or quantity.ratio:
        return number(mean)
    unit = "%" if quantity == SCORE else quantity.unit
    return f"{quantity.scale * mean:,.1f} {unit}"


def verdict_table(
    rows: list[Row], matrix: Matrix, metric: str, brief: bool = False
) -> Table | None:
    """The matrix as text; None if nothing is compared.

    Args:
        brief: the verdicts only, for a terminal.
    """
    if not matrix.judgements:
        return None
    several = len({row.choice.task for row in rows}) > 1
    made = []
    for row in rows:
        found = cells_of(row, matrix)
        if not brief:
            texts = [one.whole for one in found]
        elif row.is_baseline:
            texts = [one.text for one in found]
        else:
            texts = [one.verdict.replace(NOT_RESOLVED, UNSEEN) for one in found]
        made.append([f"{row.arm} on {row.choice.task}" if several else row.arm, *texts])
    strong = {place for place, row in enumerate(rows) if row.is_baseline}
    return Table(TITLE, headers(matrix, metric), made, [legend(matrix)], strong)


def legend(matrix: Matrix) -> str:
    """What the verdicts mean, with each quantity's margin."""
    margins = [f"{q.short.replace('.', '')} {q.margin_text}" for q in matrix.quantities]
    return (
        f"Differences to {BASELINE}, paired over seeds, with 95 % intervals; residual variance "
        "pooled over methods. better, worse, larger, smaller: p < 0.05 after Holm’s correction "
        "over the methods. tie: the interval lies within the margin. not resolved: neither. "
        + short_sentences("Margins", margins)
    )
