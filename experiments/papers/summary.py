"""All claims in one table: what was reproduced, and what was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from experiments.papers.results import Result
from experiments.papers.tables import STYLES
from experiments.papers.verdicts import Verdict


def summary_table(results: Sequence[Result]) -> Table:
    """A line a reproduction: how many of its claims got which verdict, and its seconds."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("reproduction")
    shown = [v for v in Verdict if any(claim.verdict is v for r in results for claim in r.claims)]
    for verdict in shown:
        table.add_column(f"[{STYLES[verdict]}]{verdict}[/]", justify="right")
    table.add_column("s", justify="right")
    for result in results:
        counts = Counter(claim.verdict for claim in result.claims)
        figures = [str(counts[verdict] or "") for verdict in shown]
        table.add_row(escape(result.title), *figures, f"{result.seconds:.0f}")
    return table


def counted(results: Sequence[Result]) -> str:
    """The verdicts of all claims in one sentence."""
    counts = Counter(claim.verdict for result in results for claim in result.claims)
    parts = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
    return f"{sum(counts.values())} claims: {', '.join(parts)}"
