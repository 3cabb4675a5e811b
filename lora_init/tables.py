"""Plain-text tables, for plans and reports."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def render(header: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> str:
    """A table as text; the first column is left-aligned, names are never cut."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    buffer = io.StringIO()
    width = 40 + 40 * len(header)  # wide enough for any name; trailing blanks are cut below
    Console(file=buffer, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)
