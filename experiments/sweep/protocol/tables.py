"""What the terminal shows of a protocol: the plan before, the grid after."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table

from experiments.sweep.protocol.costs import Estimate, duration
from experiments.sweep.protocol.selection import Choice


def plan_table(parts: Mapping[str, Estimate]) -> Table:
    """A line a stage: how many runs are left, and about how long they take."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("stage")
    table.add_column("runs left", justify="right")
    table.add_column("about", justify="right")
    for name, estimate in parts.items():
        time = "?" if estimate.seconds is None else duration(estimate.seconds)
        table.add_row(name, str(estimate.runs), time)
    return table


def grid_table(
    merits: Mapping[str, Mapping[float, list[float]]], choices: Mapping[str, Choice], select_by: str
) -> Table:
    """Mean validation figure by arm and learning rate; the chosen one in bold."""
    rates = sorted({rate for by_rate in merits.values() for rate in by_rate})
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("validation score, %" if select_by == "score" else "validation loss")
    for rate in rates:
        table.add_column(f"{rate:g}", justify="right")
    for label, by_rate in merits.items():
        chosen = choices.get(label)
        cells = [
            cell(by_rate[rate], chosen is not None and rate == chosen.rate, select_by)
            if rate in by_rate
            else ""
            for rate in rates
        ]
        table.add_row(label, *cells)
    return table


def cell(figures: list[float], chosen: bool, select_by: str) -> str:
    mean = sum(figures) / len(figures)
    if math.isinf(mean):
        return "diverged"
    text = f"{100 * mean:.1f}" if select_by == "score" else f"{-mean:.3f}"
    return f"[bold]{text}[/bold]" if chosen else text
