"""All claims in one table: what was reproduced, and what was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from experiments.papers.result import Result
from experiments.papers.text import STYLES, markdown
from experiments.papers.claim import Claim, Verdict

OWN = "our own"


def published(claims: Iterable[Claim]) -> list[Claim]:
    """Those that a paper makes: they alone are counted as reproduced or not."""
    return [claim for claim in claims if claim.published]


def summary_table(results: Sequence[Result]) -> Table:
    """A line a reproduction: how many published claims got which verdict, how many questions are
    our own, and its seconds."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("reproduction", no_wrap=True)
    shown = verdicts_of(results)
    for verdict in shown:
        table.add_column(f"[{STYLES[verdict]}]{verdict}[/]", justify="right")
    table.add_column(OWN, justify="right")
    table.add_column("s", justify="right")
    for result in results:
        table.add_row(escape(result.name), *figures(result, shown), f"{result.seconds:.0f}")
    return table


def summary_markdown(results: Sequence[Result]) -> str:
    """The same without the seconds, for a page."""
    shown = verdicts_of(results)
    headers = ["what was measured again", *map(str, shown), OWN]
    rows = [[result.title, *figures(result, shown)] for result in results]
    return markdown(headers, rows, [False] + [True] * (len(headers) - 1))


def verdicts_of(results: Sequence[Result]) -> list[Verdict]:
    """The verdicts that some published claim got, in their order."""
    found = {claim.verdict for result in results for claim in published(result.claims)}
    return [verdict for verdict in Verdict if verdict in found]


def figures(result: Result, shown: Sequence[Verdict]) -> list[str]:
    """A number a verdict, then the questions of our own; nothing for zero."""
    counts = Counter(claim.verdict for claim in published(result.claims))
    own = len(result.claims) - counts.total()
    return [str(number or "") for number in (*(counts[verdict] for verdict in shown), own)]


def counted(results: Sequence[Result]) -> str:
    """The verdicts of all claims in one sentence."""
    claims = [claim for result in results for claim in result.claims]
    theirs = published(claims)
    told = f"{len(theirs)} published claims: {by_verdict(theirs)}"
    own = [claim for claim in claims if not claim.published]
    if not own:
        return told
    questions = "1 question" if len(own) == 1 else f"{len(own)} questions"
    return f"{told}; {questions} of our own: {by_verdict(own)}"


def by_verdict(claims: Sequence[Claim]) -> str:
    counts = Counter(claim.verdict for claim in claims)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
