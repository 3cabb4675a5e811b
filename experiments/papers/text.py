"""Claims and tables as text: for a terminal, in Markdown, and as cells of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from .claim import Claim, Verdict
from .reproduction import Table

NOTHING = "–"
STYLES = {
    Verdict.REPRODUCED: "green",
    Verdict.SAME_DIRECTION: "cyan",
    Verdict.NOT_REPRODUCED: "yellow",
    Verdict.CONTRADICTS: "red",
    Verdict.NOT_RESOLVED: "dim",
    Verdict.NOT_JUDGED: "dim",
}
CLAIM_HEADERS = ("claim", "paper", "ours", "verdict", "decided by")


def claim_cells(claim: Claim) -> list[str]:
    """The texts of a claim under `CLAIM_HEADERS`."""
    statement = claim.statement if claim.published else f"{claim.statement} (our own question)"
    return [statement, claim.paper, claim.ours, str(claim.verdict), claim.criterion]


def cells(table: Table) -> list[list[str]]:
    """The rows of a table as text."""
    columns = table.frame.columns
    return [
        [cell(value, table.formats.get(name)) for name, value in zip(columns, row, strict=True)]
        for row in table.frame.itertuples(index=False, name=None)
    ]


def cell(value: Any, form: str | None = None) -> str:
    """One value as text: a number has three digits unless a format is given."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if form is not None:
        return format(value, form)
    if isinstance(value, int) or (value == round(value) and abs(value) < 1e6):
        return f"{value:.0f}"
    return f"{value:.3g}"


def numeric(table: Table) -> list[bool]:
    """Whether each column holds numbers."""
    return [pd.api.types.is_numeric_dtype(table.frame[name]) for name in table.frame]


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """A Markdown table; `right` says which columns are aligned to the right."""
    rule = ["---:" if flag else ":---" for flag in right]
    lines = [list(headers), rule, *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in line) + " |"
        for line in lines
    )


def claims_markdown(claims: Sequence[Claim]) -> str:
    """All claims as a Markdown table."""
    return markdown(CLAIM_HEADERS, [claim_cells(c) for c in claims], [False] * len(CLAIM_HEADERS))


def table_markdown(table: Table) -> str:
    """A table in Markdown."""
    return markdown(list(map(str, table.frame.columns)), cells(table), numeric(table))


def terminal_claims(claims: Sequence[Claim]) -> RichTable:
    """The claims for a terminal, without their criteria."""
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1))
    for header, ratio in zip(CLAIM_HEADERS[:4], (5, 4, 4, 2), strict=True):
        shown.add_column(header, ratio=ratio, overflow="fold")
    for claim in claims:
        style = STYLES[claim.verdict]
        statement, paper, ours, verdict, _ = map(escape, claim_cells(claim))
        shown.add_row(statement, paper, ours, f"[{style}]{verdict}[/{style}]")
    return shown


def terminal_table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]
) -> RichTable:
    """A table for a terminal, from its texts."""
    shown = RichTable(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left")
    for name, flag in zip(headers, right, strict=True):
        shown.add_column(escape(name), justify="right" if flag else "left")
    for row in rows:
        shown.add_row(*map(escape, row))
    return shown
