"""The rows as text: for a terminal and as Markdown, with the same cells.

A column that no row fills is left out. After the columns that all sections have come those of the
section (`Extra`), or one for each figure where it names none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from experiments.benchmark.rows import Quality, Row

NOTHING = "–"
LEFT = ("model", "case", "quality", "note")
BREAKS, LINE = ("quality",), 26 * " "
"""Columns of sentences, and the least room for a line of theirs."""
MARGIN = 3
LEAVE_OUT = ("quality", "torch.linalg", "model")
"""In this order, after a section's own columns, where a terminal is narrow."""
ESSENTIAL = ("case", "ours", "PEFT", "ratio", "target")

Cell = Callable[[Row], str]
Extra = Mapping[str, Cell]


def columns(rows: Sequence[Row], extra: Extra | None = None) -> dict[str, Cell]:
    """By its heading, what makes a column's cells."""
    if extra is None:
        names = dict.fromkeys(name for row in rows for name in row.figures)
        extra = {n: lambda row, n=n: figure(n, row.figures.get(n)) for n in names}
    peers = {row.peer for row in rows if row.ratio is not None} or {"PEFT"}
    peer = peers.pop() if len(peers) == 1 else "peer"
    every: dict[str, Cell] = {
        "model": lambda row: row.model,
        "case": lambda row: row.case,
        "ours": lambda row: amount(row.ours, row.unit),
        "PEFT": lambda row: amount(row.peft, row.unit),
        "torch.linalg": lambda row: amount(row.exact, row.unit),
        f"ratio {peer} / ours": lambda row: ratio(row) if peer == row.peer else against(row),
        "target": target,
        "quality": lambda row: "; ".join(quality(n, q) for n, q in row.quality.items()),
        **extra,
        "note": lambda row: row.note,
    }
    return {
        name: cell
        for name, cell in every.items()
        if any(cell(row) not in ("", NOTHING) for row in rows)
    }


def amount(value: float | None, unit: str) -> str:
    """A time in seconds or milliseconds, a size in MiB, or a factor."""
    if value is None:
        return NOTHING
    if unit == "s":
        # From where three digits round up to a thousand, a thousand of them are a second.
        return f"{value:.2f} s" if abs(value) >= 0.9995 else f"{1e3 * value:.3g} ms"
    return f"{value:.1f} {unit}" if unit == "MiB" else f"{value:.2f}{unit}"


def figure(name: str, value: float | None) -> str:
    """A figure beside the times: with its unit where the name ends in one, else in powers of 10."""
    if value is None:
        return NOTHING
    _, _, unit = name.rpartition(", ")
    if unit in ("s", "MiB"):
        return amount(value, unit)
    if value == round(value):
        return f"{value:g}"
    return f"{value:.1e}" if value < 0.1 else f"{value:.3g}"


def ratio(row: Row) -> str:
    """The ratio and its interval, where that has a width."""
    if row.ratio is None:
        return NOTHING
    text = f"{row.ratio.estimate:.3g}" if row.ratio.estimate >= 10 else f"{row.ratio.estimate:.2f}"
    if row.ratio.low == row.ratio.high:
        return text
    return f"{text} [{row.ratio.low:.2f}, {row.ratio.high:.2f}]"


def against(row: Row) -> str:
    """The ratio where rows have different peers."""
    return ratio(row) if row.ratio is None or row.peer == "PEFT" else f"{ratio(row)} ({row.peer})"


def target(row: Row) -> str:
    """What is wanted of the time, and whether that and the quality were met."""
    wanted = [f"≥ {row.target:g}"] if row.target is not None else []
    wanted += [f"≤ {row.ceiling:g}"] if row.ceiling is not None else []
    wanted = wanted or (["quality"] if row.quality and row.verdict else [])
    return ": ".join([*wanted, *([row.verdict] if row.verdict else [])]) or NOTHING


def quality(name: str, found: Quality) -> str:
    """A figure of quality with what is demanded of it, and PEFT's."""
    text = f"{name} {share(name, found.ours)}"
    if found.limit is not None:
        text += f" {'≥' if found.least else '≤'} {share(name, found.limit)}"
    return text if found.peft is None else f"{text} (PEFT {share(name, found.peft)})"


def share(name: str, value: float | None) -> str:
    """Of a figure of quality: an overlap as a share of 1, others in powers of 10."""
    if value is None:
        return NOTHING
    return f"{value:.4g}" if name == "overlap" else f"{value:.1e}"


def terminal_table(rows: Sequence[Row], extra: Extra | None = None, width: int = 10_000) -> Group:
    """Tables without the notes, which follow as lines: they are too long for a column.

    Args:
        width: of the terminal. Where it is too small, columns are left out, those first that say
            least of who is faster, and a line names them; each model then has a table of its own.
    """
    made = columns(rows, extra)
    made.pop("note", None)
    own = [n for n in made if n not in LEAVE_OUT and n.partition(" ")[0] not in ESSENTIAL]
    left_out = []
    for name in (*reversed(own), *(name for name in LEAVE_OUT if name in made)):
        if sum(needed(column, cell, rows) for column, cell in made.items()) <= width - 2:
            break
        left_out.append(name)
        del made[name]
    if "model" in made:
        tables = [one_table(rows, made)]
    else:
        left_out.remove("model")
        models = dict.fromkeys(row.model for row in rows)
        tables = [one_table([r for r in rows if r.model == m], made, title=m) for m in models]
    notes = [escape(f"  {row.model} {row.case}: {row.note}") for row in rows if row.note]
    if left_out:
        notes.append(f"  no room here for {', '.join(sorted(left_out))}: see table.md")
    return Group(*tables, *notes)


def one_table(rows: Sequence[Row], made: Extra, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title and escape(title), title_justify="left")
    for column, cell in made.items():
        table.add_column(
            escape(column),
            justify="left" if column in LEFT else "right",
            no_wrap=column not in BREAKS and not column.startswith("ratio"),
            min_width=needed(column, cell, rows) - MARGIN,
        )
    for row in rows:
        style = {"missed": "red", "open": "yellow"}.get(row.verdict or "")
        table.add_row(*(escape(cell(row)) for cell in made.values()), style=style)
    return table


def needed(column: str, cell: Cell, rows: Sequence[Row]) -> int:
    """Characters that a column takes with its margins, broken where that does no harm."""
    texts = [column, *map(cell, rows)]
    if column in BREAKS:
        texts = [LINE]
    elif column.startswith("ratio"):  # a peer's name may stand below its ratio
        texts = [part for text in texts for part in text.split(" (")]
    return MARGIN + max(map(cell_len, texts))


def markdown_table(rows: Sequence[Row], extra: Extra | None = None) -> str:
    made = columns(rows, extra)
    rule = [":---" if c in LEFT else "---:" for c in made]
    lines = [list(made), rule, *([cell(row) for cell in made.values()] for row in rows)]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )
