"""Plain-text tables and short lists of names, for plans, reports and messages."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def render(header: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> str:
    """Format a table as text; the first column is left-aligned, and names are never cut."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    buffer = io.StringIO()
    width = 40 + 40 * len(header)  # wide enough for any name; trailing spaces are removed below
    Console(file=buffer, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def grouped(names: Iterable[str]) -> list[str]:
    """Combine names that differ only in their numbers, in order of first occurrence.

    `layers.0.mlp.up`, `layers.1.mlp.up` and `layers.2.mlp.up` become `layers.{0..2}.mlp.up (3)`.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(names):
        pattern = tuple("#" if part.isdecimal() else part for part in name.split("."))
        groups.setdefault(pattern, []).append(name)
    return [_collapsed(pattern, group) for pattern, group in groups.items()]


def _collapsed(pattern: Sequence[str], names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    columns = zip(*(name.split(".") for name in names), strict=True)
    parts = [
        _range(sorted({int(part) for part in column})) if kind == "#" else kind
        for kind, column in zip(pattern, columns, strict=True)
    ]
    return f"{'.'.join(parts)} ({len(names)})"


def _range(numbers: list[int]) -> str:
    """The numbers in braces, with runs of three or more as first..last; one number as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return "{" + ",".join(shown) + "}"
