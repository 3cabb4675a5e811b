"""A reproduction's folder: claims, tables, pictures, and `result.json`, which is written last.

A result is taken again only while nothing it depends on has changed: the settings, and the sources
of `lora_init` and of the experiments that it may have used.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from experiments.environment import describe_environment
from experiments.papers.drawing import page_specification, write_pictures
from experiments.papers.findings import Findings, Table
from experiments.papers.reproduction import Paper, PaperSettings
from experiments.papers.text import cells, claims_markdown, numeric, table_markdown
from experiments.papers.claim import Claim, as_claim
from experiments.runs import write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
SHARED = (
    "subject", "corpus", "tasks", "starts", "language", "fine_tuning", "interval", "fitting",
    "claim", "drawing",
)  # fmt: skip
OTHERS = ("training", "micro_batches", "schedule", "benchmark/powerlaw", "measures/forgetting")
SOURCES = ("lora_init", "experiments/data", "experiments/models", "experiments/tasks")


@dataclass(frozen=True)
class Result:
    """A finished reproduction as it is kept.

    Attributes:
        tables: each with name, title, note, headers, rows (text) and `right`, by column.
        figures: each with name, title, caption and the page's Vega-Lite specification.
    """

    name: str
    title: str
    source: str
    question: str
    form: str
    claims: list[Claim]
    setting: dict[str, str]
    discussion: list[str]
    tables: list[dict[str, Any]]
    figures: list[dict[str, Any]]
    settings: dict[str, Any]
    environment: dict[str, Any]
    fingerprint: str
    seconds: float


def folder(name: str, settings: PaperSettings) -> Path:
    return Path(settings.output) / settings.form / name


def fingerprint(name: str, settings: PaperSettings) -> str:
    """Of the settings that matter and of the code."""
    outside = PaperSettings.OUTSIDE_IDENTITY
    kept = {key: value for key, value in asdict(settings).items() if key not in outside}
    told = json.dumps([name, kept, source_hash(name)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@functools.cache
def source_hash(name: str) -> str:
    """Of the library, the data and models, what all reproductions share, and this one's files."""
    papers = ROOT / "experiments" / "papers"
    files = [
        *(path for source in SOURCES for path in (ROOT / source).rglob("*.py")),
        *(papers / f"{shared}.py" for shared in SHARED),
        *(ROOT / "experiments" / f"{used}.py" for used in OTHERS),
        *papers.glob(f"{name}*.py"),
        *(papers / name).rglob("*.py"),
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_result(
    paper: Paper, settings: PaperSettings, findings: Findings, seconds: float
) -> Result:
    """Write everything into the reproduction's folder; `result.json` last and atomically."""
    output = folder(paper.name, settings)
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").unlink(missing_ok=True)
    for figure in findings.figures:
        write_pictures(figure, output)
    for table in findings.tables:
        write_text(output / f"{table.name}.csv", table.frame.to_csv(index=False))
        write_text(output / f"{table.name}.md", table_markdown(table) + "\n")
    write_text(output / "claims.md", claims_markdown(findings.claims) + "\n")
    result = Result(
        name=paper.name,
        title=paper.title,
        source=paper.source,
        question=paper.question,
        form=settings.form,
        claims=findings.claims,
        setting=findings.setting,
        discussion=findings.discussion,
        tables=[kept(table) for table in findings.tables],
        figures=[
            {
                "name": figure.name,
                "title": figure.title,
                "caption": figure.caption,
                "specification": page_specification(figure),
            }
            for figure in findings.figures
        ],
        settings=asdict(settings),
        environment=describe_environment(),
        fingerprint=fingerprint(paper.name, settings),
        seconds=seconds,
    )
    write_json(output / "result.json", asdict(result))
    return result


def kept(table: Table) -> dict[str, Any]:
    return {
        "name": table.name,
        "title": table.title,
        "note": table.note,
        "headers": list(map(str, table.frame.columns)),
        "rows": cells(table),
        "right": numeric(table),
    }


def read_result(path: Path) -> Result | None:
    """The result in a folder; None where there is none, or no whole one."""
    try:
        values = json.loads((path / "result.json").read_text())
        claims = list(map(as_claim, values["claims"]))
        known = {field.name for field in fields(Result)}
        return Result(**{key: values[key] for key in known if key != "claims"}, claims=claims)
    except (OSError, ValueError, KeyError, TypeError):
        return None
