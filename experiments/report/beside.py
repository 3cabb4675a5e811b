"""What stands beside our results, as text: another version of the code, and PEFT's own."""

from __future__ import annotations

import math

from .comparison import FIGURES, Comparison, Figure
from .findings import mantissa, signed
from .peft_results import PeftRow
from .result_table import count, scientific, seconds


def change_cell(figure: Figure, kind: str) -> str:
    """`theirs → ours`, and for a score its difference with half of its interval."""
    if kind == "score":
        half = figure.difference.half_width
        around = "" if math.isnan(half) else f" ± {100 * half:.1f}"
        return f"{signed(100 * figure.difference.estimate)}{around}"
    show = seconds if kind == "init_seconds" else scientific
    theirs, ours = (None if math.isnan(v) else v for v in (figure.theirs, figure.ours))
    return f"{show(theirs)} → {show(ours)}"


def change_rows(comparison: Comparison) -> list[list[str]]:
    """Arm, task, learning rate, seeds, the three figures, what differs: as text."""
    return [
        [
            c.arm, c.task, mantissa(c.learning_rate), str(c.seeds),
            "test" if c.tested else "validation",
            *(change_cell(c.figures[name], name) for name in FIGURES), ", ".join(c.flagged),
        ]
        for c in comparison.changes
    ]  # fmt: skip


CHANGE_HEADERS = (
    "method", "task", "learning rate", "seeds", "score of", "difference, points", "init s",
    "output gap", "differs",
)  # fmt: skip


def peft_rows(rows: list[PeftRow]) -> list[list[str]]:
    """PEFT's results as text."""
    return [
        [
            r.experiment, r.task, r.model, r.adapter, r.init or "—", count(r.rank),
            "—" if r.learning_rate is None else mantissa(r.learning_rate), count(r.steps),
            count(r.trainable), f"{100 * r.score:.1f}", r.version or "—",
        ]
        for r in rows
    ]  # fmt: skip


PEFT_HEADERS = (
    "PEFT’s experiment", "task", "model", "adapter", "init", "rank", "learning rate", "steps",
    "trainable", "test accuracy, %", "PEFT",
)  # fmt: skip


def plain_markdown(title: str, headers: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(headers) + " |"]
    lines.append("|" + "---|" * len(headers))
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
