"""The quantities that the report judges, and what counts as a difference in each."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2.0**20
HIGHER, LOWER, NEITHER = "higher", "lower", "neither"


@dataclass(frozen=True)
class Quantity:
    """One measured quantity of a run.

    Attributes:
        name: the column of the table of runs.
        label: for sentences and tables.
        short: for the heading of a column.
        better: "higher", "lower", or "neither" if no direction is good by itself.
        ratio: whether methods are compared by a factor (on logarithms), else by a difference.
        margin: differences below it do not matter: a share of the baseline's value for a ratio,
            else in the quantity's own unit.
        unit, scale: for texts, the unit that a value times `scale` has.
    """

    name: str
    label: str
    short: str
    better: str
    margin: float
    ratio: bool = True
    unit: str = ""
    scale: float = 1.0

    @property
    def margin_text(self) -> str:
        if self.ratio:
            return f"±{100 * self.margin:g} %"
        return f"±{self.scale * self.margin:g} {self.unit}"


SCORE = Quantity("score", "score", "score", HIGHER, 0.01, False, "points", 100.0)
QUANTITIES = (
    SCORE,
    Quantity("validation_loss", "validation loss at equal steps", "valid. loss", LOWER, 0.02),
    Quantity(
        "steps_to_baseline", "steps to the baseline’s final loss", "steps to loss", LOWER, 0.1
    ),
    Quantity("forgetting", "forgetting", "forgets", LOWER, 0.1),
    Quantity("update_size", "size of the update", "update", NEITHER, 0.1),
    Quantity("init_seconds", "seconds of the start", "init s", LOWER, 0.25),
    Quantity(
        "added_memory_bytes",
        "memory of the start",
        "memory",
        LOWER,
        16 * MIB,
        False,
        "MiB",
        1 / MIB,
    ),
    Quantity("first_step_gradient_norm", "first gradient", "first grad", NEITHER, 0.1),
    Quantity("first_step_error", "error of the first step", "first step", LOWER, 0.05),
)
"""In the report's order. The first is the score, whatever its metric."""
