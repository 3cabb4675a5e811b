"""A survey as a table on the screen, or as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...run.lock import STALE
from .survey import Line, Survey, seconds_left

COLORS = {"finished": "green", "running": "cyan", "failed": "red", "died": "red"}
FIRST = ("running", "failed", "died", "missing", "finished")
SHOWN = 40


def as_json(found: Survey) -> dict[str, Any]:
    return {
        "sweep": found.sweep,
        "total": found.total,
        "counts": found.counted(),
        "seconds_left": seconds_left(found.lines),
        "runs": [asdict(line) for line in found.lines],
    }


def as_page(found: Survey) -> Group:
    """A headline, then the runs: running and failed ones first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("state", "run", "steps", "%", "heartbeat", "process"):
        numeric = heading in ("steps", "%", "heartbeat")
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    ordered = sorted(found.lines, key=lambda line: FIRST.index(line.state))
    for line in ordered[:SHOWN]:
        table.add_row(*cells(line))
    parts = [Text(headline(found)), table]
    if len(ordered) > SHOWN:
        parts.append(Text(f"… and {len(ordered) - SHOWN} more", style="dim"))
    return Group(*parts)


def headline(found: Survey) -> str:
    counts = ", ".join(f"{number} {state}" for state, number in sorted(found.counted().items()))
    left = seconds_left(found.lines)
    time = "time left not known yet" if left is None else f"about {readable(left)} left"
    return f"{found.sweep}: {len(found.lines)} runs: {counts or 'none'}; {time}"


def cells(line: Line) -> list[Text]:
    state = line.state if line.reason is None else f"{line.state}: {line.reason}"
    steps = "" if line.step is None else f"{line.step}/{line.steps}"
    share = f"{100 * line.step / line.steps:.0f}" if line.step is not None and line.steps else ""
    age = "" if line.age is None else f"{readable(line.age)} ago"
    late = "yellow" if line.age is not None and line.age > STALE else ""
    return [
        Text(state, style=COLORS.get(line.state, "dim")),
        Text(line.name),
        Text(steps),
        Text(share),
        Text(age, style=late),
        Text(line.worker or ""),
    ]


def readable(seconds: float) -> str:
    """75 -> "1 min 15 s"; 9000 -> "2 h 30 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
