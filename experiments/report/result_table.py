"""The table of results: one row per method, one column per measure that the runs have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .cells import mantissa, number, score_text
from .summary import Row
from .table import Table

LONG_NAME = 16  # characters of a name that leave room for every column
MEASURES = (
    ("output gap", "output_gap",
     "largest change of a logit by the initialization, at step 0, over seeds"),
    ("init s", "init_seconds",
     "seconds to initialize, calibration included: mean over seeds, or of the run that computed "
     "what the method's other runs loaded from the cache"),
    ("trainable", "trainable_parameters", "trainable parameters"),
    ("first grad", "first_step_gradient_norm", "gradient norm at the first step, mean over seeds"),
    ("update", "update_size",
     "‖ΔW‖ / ‖W‖ over all adapted layers after training, mean over seeds"),
    ("forgetting", "forgetting", "forgetting against the original base model, mean over seeds"),
)  # fmt: skip
"""Headings, names of measures, and what they are."""
OPTIONAL = {"update", "forgetting"}


@dataclass(frozen=True)
class Column:
    """`show` gives the cell's text, `value` what a sort compares."""

    header: str
    value: Callable[[Row], float | str | None]
    show: Callable[[Row], str]
    help: str = ""


def columns(metric: str, rows: list[Row]) -> list[Column]:
    """The columns for which `rows` have data."""
    made = [
        Column("method", lambda row: row.arm, lambda row: row.arm),
        Column(
            f"{metric}, %",
            lambda row: row.score.estimate,
            lambda row: score_text(row.score),
            "mean over seeds ± half of its 95 % interval",
        ),
    ]
    if any(row.choice.rates > 1 for row in rows):
        made.append(
            Column(
                "learning rate",
                lambda row: row.choice.learning_rate,
                lambda row: mantissa(row.choice.learning_rate) + "*" * row.choice.at_edge,
                "the chosen one; *: the lowest or highest that was tried",
            )
        )
    for header, name, help in MEASURES:
        if header not in OPTIONAL or any(row.get(name) is not None for row in rows):
            made.append(
                Column(
                    header,
                    lambda row, name=name: row.get(name),
                    lambda row, name=name: number(row.get(name)),
                    help,
                )
            )
    return made


def results(rows: list[Row], metric: str, title: str, narrow: bool = False) -> Table:
    """The table as text. `narrow`: only columns that fit a terminal of 80 characters."""
    hidden: set[str] = set()
    if narrow:
        hidden |= OPTIONAL
        if any(row.choice.rates > 1 for row in rows):
            hidden |= {"output gap", "first grad"}  # the learning rate takes their place
        if max(len(row.arm) for row in rows) > LONG_NAME:
            hidden |= {"trainable"}
    shown = [column for column in columns(metric, rows) if column.header not in hidden]
    return Table(
        title,
        [column.header for column in shown],
        [[column.show(row) for column in shown] for row in rows],
        [f"{column.header}: {column.help}" for column in shown if column.help],
        {place for place, row in enumerate(rows) if row.is_baseline},
    )
