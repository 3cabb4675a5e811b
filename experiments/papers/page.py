"""All reproductions on one HTML page, in one Markdown file with pictures, and as verdicts in JSON.

A later measurement is compared with the verdicts in `verdicts.json`.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..report.page import as_script, bundle
from ..run.files import write_json, write_text
from .claim import Claim, Verdict, as_claim
from .result import Result
from .text import CLAIM_HEADERS, claims_markdown, markdown

HERE = Path(__file__).parent
STYLE = HERE.parent / "report" / "page.css"
VERDICTS = "verdicts.json"
OWN = "our own"
TITLE = "Published claims, measured again"
CAVEAT = (
    "Each claim was measured on models that two CPU cores can carry, far smaller than the papers’. "
    "A verdict speaks of the claim on these models: “same direction” means that the effect has the "
    "claimed sign but not all that was asked, and what decided stands beside every verdict."
)


def write_page(results: Sequence[Result], output: Path, title: str = TITLE) -> Path:
    """Write `index.html`, `README.md`, the pictures and `verdicts.json`; return the page's path.

    The pictures are copied from the folders of the results. The page loads nothing.
    """
    output.mkdir(parents=True, exist_ok=True)
    for result in results:
        for old in output.glob(f"{result.name}-*.png"):
            old.unlink()  # the reproduction may have dropped this figure
        source = Path(result.settings["output"]) / result.form / result.name
        for figure in result.figures:
            name = figure["name"]
            shutil.copy(source / f"{name}.png", output / f"{result.name}-{name}.png")
    write_text(output / "README.md", as_markdown(results, title))
    write_text(output / "index.html", as_html(results, title))
    claims = {result.name: [asdict(claim) for claim in result.claims] for result in results}
    write_json(output / VERDICTS, claims)
    return output / "index.html"


def read_verdicts(page: Path) -> dict[str, list[Claim]]:
    """The claims of a page's folder, by reproduction."""
    kept = json.loads((page / VERDICTS).read_text(encoding="utf-8"))
    return {name: list(map(as_claim, claims)) for name, claims in kept.items()}


def as_html(results: Sequence[Result], title: str) -> str:
    """The page with its charts and the code that draws them."""
    specifications = {
        f"{result.name}-{figure['name']}": figure["specification"]
        for result in results
        for figure in result.figures
    }
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = STYLE.read_text(encoding="utf-8") + (HERE / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        results=results,
        title=title,
        counted=count_verdicts(results),
        caveat=CAVEAT,
        duration=duration,
        machines=machines(results),
        headers=CLAIM_HEADERS,
        classes={verdict: str(verdict).replace(" ", "-") for verdict in Verdict},
        data=as_script(specifications),
        libraries=Markup(bundle()),
        style=Markup(style),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
    )


def as_markdown(results: Sequence[Result], title: str) -> str:
    """The same for readers of the repository: claims, tables and pictures."""
    headers, rows = verdict_counts(results)
    counts = markdown(headers, rows, [False] + [True] * (len(headers) - 1))
    parts = [
        f"# {title}\n",
        f"{count_verdicts(results)}. Written by `make papers` ({'; '.join(machines(results))}). "
        "The same with charts to hover over: [index.html](index.html).\n",
        f"{CAVEAT}\n",
        f"{counts}\n",
    ]
    for result in results:
        parts.append(f"## {result.title}\n\n*{result.source}.* {result.question}\n")
        facts = result.setting | {"time": duration(result)}
        parts.append("\n".join(f"- {label}: {words}" for label, words in facts.items()))
        parts.append("\n" + claims_markdown(result.claims) + "\n")
        parts += [f"{c.statement}: {c.remark}\n" for c in result.claims if c.remark]
        parts += [f"{sentence}\n" for sentence in result.discussion]
        for figure in result.figures:
            parts.append(f"![{figure['title']}]({result.name}-{figure['name']}.png)\n")
            parts.append(f"{figure['caption']}\n")
        for table in result.tables:
            text = markdown(table["headers"], table["rows"], table["right"])
            note = f"\n\n{table['note']}" if table["note"] else ""
            parts.append(
                f"<details><summary>{table['title']}</summary>\n\n{text}{note}\n\n</details>\n"
            )
    return "\n".join(parts)


def machines(results: Sequence[Result]) -> list[str]:
    """The machines of the measurements, each once."""
    return list(dict.fromkeys(machine(result) for result in results))


def machine(result: Result) -> str:
    """The machine of one measurement, with its threads and the versions of the libraries."""
    known = result.environment
    versions = [f"{name} {known['packages'][name]}" for name in ("torch", "transformers")]
    threads = f"{known['threads']} thread{'s' if known['threads'] != 1 else ''} each"
    return ", ".join([known["gpu"] or known["cpu"], threads, *versions])


def duration(result: Result) -> str:
    """The seconds of a measurement, in words."""
    return f"{result.seconds:.0f} s ({result.form} form)"


def verdict_counts(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: for each reproduction the number of published claims by verdict."""
    found = {claim.verdict for result in results for claim in published(result.claims)}
    shown = [verdict for verdict in Verdict if verdict in found]
    rows = []
    for result in results:
        counts = Counter(claim.verdict for claim in published(result.claims))
        own = len(result.claims) - counts.total()
        numbers = [*(counts[verdict] for verdict in shown), own]
        rows.append([result.title, *(str(number or "") for number in numbers)])
    return ["what was measured again", *map(str, shown), OWN], rows


def published(claims: Iterable[Claim]) -> list[Claim]:
    """The claims that a paper makes; questions of this project are counted separately."""
    return [claim for claim in claims if claim.published]


def count_verdicts(results: Sequence[Result]) -> str:
    """The verdicts of all claims in one sentence."""
    claims = [claim for result in results for claim in result.claims]
    own = [claim for claim in claims if not claim.published]
    theirs = f"{len(claims) - len(own)} published claims: {by_verdict(published(claims))}"
    if not own:
        return theirs
    questions = "1 question" if len(own) == 1 else f"{len(own)} questions"
    return f"{theirs}; {questions} of our own: {by_verdict(own)}"


def by_verdict(claims: Sequence[Claim]) -> str:
    """`2 reproduced, 1 contradicts`."""
    counts = Counter(claim.verdict for claim in claims)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
