"""The rows as text: for a terminal and as Markdown, with the same cells."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from experiments.benchmark.rows import Row

NOTHING = "–"
FIXED = ("model", "case", "ours", "PEFT", "ratio PEFT / ours", "target")


def header(rows: Sequence[Row]) -> list[str]:
    """The columns that all sections have, then one for each figure, then notes if there are any."""
    figures = list(dict.fromkeys(name for row in rows for name in row.figures))
    notes = ["note"] if any(row.note for row in rows) else []
    return [*FIXED, *figures, *notes]


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    fixed = {
        "model": row.model,
        "case": row.case,
        "ours": amount(row.ours, row.unit),
        "PEFT": amount(row.peft, row.unit),
        "ratio PEFT / ours": ratio(row),
        "target": target(row),
        "note": row.note,
    }
    return [fixed[c] if c in fixed else figure(c, row.figures.get(c)) for c in columns]


def amount(value: float | None, unit: str) -> str:
    """A time in seconds or milliseconds, a size in MiB, or a factor."""
    if value is None:
        return NOTHING
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    return f"{value:.1f} {unit}" if unit == "MiB" else f"{value:.2f}{unit}"


def figure(name: str, value: float | None) -> str:
    """A figure beside the times: with its unit where the name ends in one, else in powers of 10."""
    if value is None:
        return NOTHING
    _, _, unit = name.rpartition(", ")
    if unit in ("s", "MiB"):
        return amount(value, unit)
    return "0" if value == 0 else f"{value:.1e}"


def ratio(row: Row) -> str:
    """The ratio and its interval, where that has a width."""
    if row.ratio is None:
        return NOTHING
    text = f"{row.ratio.estimate:.2f}"
    if row.ratio.low == row.ratio.high:
        return text
    return f"{text} [{row.ratio.low:.2f}, {row.ratio.high:.2f}]"


def target(row: Row) -> str:
    """What is wanted, and whether it was met."""
    wanted = [f"≥ {row.target:g}"] if row.target is not None else []
    return ": ".join([*wanted, *([row.verdict] if row.verdict else [])]) or NOTHING


def terminal_table(rows: Sequence[Row]) -> Group:
    """A table without the notes, which follow it as lines: they are too long for a column."""
    columns = [column for column in header(rows) if column != "note"]
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        left = column in ("model", "case")
        table.add_column(
            escape(column),
            justify="left" if left else "right",
            no_wrap=left,
            overflow="fold",
        )
    for row in rows:
        style = {"missed": "red", "open": "yellow"}.get(row.verdict or "")
        table.add_row(*map(escape, cells(row, columns)), style=style)
    notes = [escape(f"  {row.model} {row.case}: {row.note}") for row in rows if row.note]
    return Group(table, *notes)


def markdown_table(rows: Sequence[Row]) -> str:
    columns = header(rows)
    rule = [":---" if c in ("model", "case", "note") else "---:" for c in columns]
    lines = [columns, rule, *(cells(row, columns) for row in rows)]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )
