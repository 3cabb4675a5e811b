"""The goals that were set before any card ran this, and what a run says about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experiments.gpu.record import Record

Records = dict[str, Record]


@dataclass(frozen=True)
class Goal:
    """A figure of the report, and the most (or least) that it should be.

    Attributes:
        figure: reads it from the records; None where the run does not have it.
        least: whether `limit` is a lower bound.
    """

    name: str
    limit: float
    unit: str
    figure: Callable[[Records], float | None]
    least: bool = False

    def met(self, found: float) -> bool:
        return found >= self.limit if self.least else found <= self.limit


def value(records: Records, part: str, row: str, column: str) -> float | None:
    """One figure; None where the part, the row or the figure is missing."""
    rows = records[part].rows if part in records else []
    for one in rows:
        if one["name"] == row and isinstance(one.get(column), int | float):
            return float(one[column])
    return None


def reader(part: str, row: str, column: str) -> Callable[[Records], float | None]:
    return lambda records: value(records, part, row, column)


def largest(part: str, *columns: str) -> Callable[[Records], float | None]:
    """The largest of some columns over all rows of a part."""

    def figure(records: Records) -> float | None:
        rows = records[part].rows if part in records else []
        found = [row[column] for row in rows for column in columns
                 if isinstance(row.get(column), int | float)]  # fmt: skip
        return float(max(found)) if found else None

    return figure


GOALS = (
    Goal("largest gap of s B A to the CPU", 1e-6, "of ‖W‖",
         largest("agreement", "gap_cpu", "gap_device")),
    Goal("PiSSA r=16 of Llama-2-7B", 1.0, "s", reader("methods", "pissa r=16", "model_seconds")),
    Goal("PiSSA r=128 of Llama-2-7B", 2.0, "s", reader("methods", "pissa r=128", "model_seconds")),
    Goal("slowest method of Llama-2-7B", 10.0, "s", largest("methods", "model_seconds")),
    Goal("calibration, second moments", 3.0, "plain passes",
         reader("calibration", "second moments (eva)", "passes")),
    Goal("PEFT's LoRA step over ours", 1.1, "times",
         reader("training", "PEFT LoRA / LoRA", "ratio"), least=True),
    Goal("PiSSA's step over LoRA's", 1.1, "times", reader("training", "PiSSA / LoRA", "ratio")),
)  # fmt: skip


def verdicts(records: Records, small: bool = False) -> list[dict[str, object]]:
    """Each goal, the figure that was found, and whether it is met. The small form judges none."""
    made = []
    for goal in GOALS:
        found = goal.figure(records)
        made.append(
            {
                "goal": goal.name,
                "wanted": f"{'at least' if goal.least else 'at most'} {goal.limit:g} {goal.unit}",
                "found": found,
                "met": None if found is None or small else goal.met(found),
            }
        )
    return made
