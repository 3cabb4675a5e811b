"""All reproductions as one self-contained page, as one Markdown file with pictures, and their
verdicts as JSON, against which a later measurement is held."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.papers.result import Result
from experiments.papers.summary import counted, summary_markdown
from experiments.papers.text import CLAIM_HEADERS, claims_markdown, markdown
from experiments.papers.claim import Claim, Verdict, as_claim
from experiments.report.page import as_script, bundle
from experiments.runs import write_json, write_text

HERE = Path(__file__).parent
STYLE = HERE.parent / "report" / "page.css"
VERDICTS = "verdicts.json"
CAVEAT = (
    "Each claim was measured on models that two CPU cores can carry, far smaller than the papers’. "
    "A verdict speaks of the claim on these models: “same direction” means that the effect has the "
    "claimed sign but not all that was asked, and what decided stands beside every verdict."
)
CLASSES = {verdict: str(verdict).replace(" ", "-") for verdict in Verdict}


def write_page(results: Sequence[Result], output: Path) -> Path:
    """Write `index.html`, `README.md`, the pictures and `verdicts.json`; returns the page's path.

    The pictures are copied from the results' folders; nothing on the page is loaded from anywhere.
    """
    output.mkdir(parents=True, exist_ok=True)
    for result in results:
        # Those of an earlier form of the reproduction are nobody's now.
        for earlier in output.glob(f"{result.name}-*.png"):
            earlier.unlink()
        source = Path(result.settings["output"]) / result.form / result.name
        for figure in result.figures:
            shutil.copy(source / f"{figure['name']}.png", output / picture(result, figure["name"]))
    write_text(output / "README.md", as_markdown(results))
    write_text(output / "index.html", render(results))
    claims = {result.name: [asdict(claim) for claim in result.claims] for result in results}
    write_json(output / VERDICTS, claims)
    return output / "index.html"


def read_verdicts(page: Path) -> dict[str, list[Claim]]:
    """The claims of a page's folder, by reproduction."""
    kept = json.loads((page / VERDICTS).read_text(encoding="utf-8"))
    return {name: list(map(as_claim, claims)) for name, claims in kept.items()}


def picture(result: Result, figure: str) -> str:
    return f"{result.name}-{figure}.png"


def render(results: Sequence[Result]) -> str:
    specifications = {
        f"{result.name}-{figure['name']}": figure["specification"]
        for result in results
        for figure in result.figures
    }
    loader = FileSystemLoader(HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        results=results,
        counted=counted(results),
        caveat=CAVEAT,
        duration=duration,
        machines=machines(results),
        headers=CLAIM_HEADERS,
        classes=CLASSES,
        data=as_script(specifications),
        libraries=Markup(bundle()),
        style=Markup(STYLE.read_text(encoding="utf-8") + (HERE / "page.css").read_text("utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
    )


def machines(results: Sequence[Result]) -> list[str]:
    """Where the results were taken, each place once."""
    return list(dict.fromkeys(place(result) for result in results))


def place(result: Result) -> str:
    known = result.environment
    machine = known["gpu"] or known["cpu"]
    versions = [f"{name} {known['packages'][name]}" for name in ("torch", "transformers")]
    threads = f"{known['threads']} thread{'s' if known['threads'] != 1 else ''} each"
    return ", ".join([machine, threads, *versions])


def duration(result: Result) -> str:
    return f"{result.seconds:.0f} s ({result.form} form)"


def as_markdown(results: Sequence[Result]) -> str:
    """The same for those who read the repository: claims, tables and pictures."""
    parts = [
        "# Published claims, measured again\n",
        f"{counted(results)}. Written by `make papers` ({'; '.join(machines(results))}). The same "
        "with charts to hover over: [index.html](index.html).\n",
        f"{CAVEAT}\n",
        f"{summary_markdown(results)}\n",
    ]
    for result in results:
        parts.append(f"## {result.title}\n\n*{result.source}.* {result.question}\n")
        facts = result.setting | {"time": duration(result)}
        parts.append("\n".join(f"- {label}: {words}" for label, words in facts.items()))
        parts.append("\n" + claims_markdown(result.claims) + "\n")
        parts += [f"{c.statement}: {c.remark}\n" for c in result.claims if c.remark]
        parts += [f"{sentence}\n" for sentence in result.discussion]
        for figure in result.figures:
            parts.append(f"![{figure['title']}]({picture(result, figure['name'])})\n")
            parts.append(f"{figure['caption']}\n")
        for table in result.tables:
            text = markdown(table["headers"], table["rows"], table["right"])
            note = f"\n\n{table['note']}" if table["note"] else ""
            parts.append(
                f"<details><summary>{table['title']}</summary>\n\n{text}{note}\n\n</details>\n"
            )
    return "\n".join(parts)
