"""The folder of a finished reproduction: claims, tables, pictures and `result.json`.

`result.json` is written last. A result is used again while the options and the code that it depends
on are the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lora_init

from ..config.location import FOLDER
from ..run.environment import describe_environment
from ..run.files import write_json, write_text
from .claim import Claim, as_claim
from .drawing import page_specification, write_pictures
from .reproduction import (
    OUTSIDE_IDENTITY,
    Figure,
    Findings,
    Options,
    Reproduction,
    Table,
)
from .text import cells, claims_markdown, numeric, table_markdown

# Code that decides a measurement, with the library. The page and the command line do not.
SOURCES = (
    *("data", "models", "tasks", "training", "config/training.py"),
    *("benchmark/powerlaw.py", "measures/forgetting.py", "measures/fidelity.py"),
)
SHARED = (
    *(
        "subject",
        "corpus",
        "tasks",
        "starts",
        "language",
        "fine_tuning",
        "classifier*",
        "paired_comparison",
    ),
    *("reproduction", "interval", "claim", "drawing"),
)


@dataclass(frozen=True)
class Result:
    """A finished reproduction as `result.json` keeps it.

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


def folder(name: str, options: Options) -> Path:
    """The folder of one reproduction's result."""
    return Path(options.output) / options.form / name


def fingerprint(name: str, options: Options) -> str:
    """A hash of the options that decide the result, and of the code."""
    kept = {key: value for key, value in asdict(options).items() if key not in OUTSIDE_IDENTITY}
    text = json.dumps([name, kept, source_hash(name)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def source_hash(name: str) -> str:
    """A hash of the library, the shared modules, and the modules of one reproduction."""
    patterns = [*SOURCES, *(f"papers/{shared}.py" for shared in (*SHARED, f"{name}*"))]
    patterns.append(f"papers/{name}")
    library = Path(lora_init.__file__).parent
    places = {library, *(place for pattern in patterns for place in FOLDER.glob(pattern))}
    files = {file for path in places for file in ([path] if path.is_file() else path.rglob("*.py"))}
    names = {
        file: file.relative_to(library.parent if file.is_relative_to(library) else FOLDER)
        for file in files
    }
    digest = hashlib.sha256()
    for path in sorted(names, key=names.__getitem__):
        digest.update(str(names[path]).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_result(
    reproduction: Reproduction, options: Options, findings: Findings, seconds: float
) -> Result:
    """Write the files of a result; `result.json` last and atomically."""
    output = folder(reproduction.name, options)
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").unlink(missing_ok=True)
    for figure in findings.figures:
        write_pictures(figure, output)
    for table in findings.tables:
        write_text(output / f"{table.name}.csv", table.frame.to_csv(index=False))
        write_text(output / f"{table.name}.md", table_markdown(table) + "\n")
    write_text(output / "claims.md", claims_markdown(findings.claims) + "\n")
    result = Result(
        name=reproduction.name,
        title=reproduction.title,
        source=reproduction.source,
        question=reproduction.question,
        form=options.form,
        claims=findings.claims,
        setting=findings.setting,
        discussion=findings.discussion,
        tables=[table_fields(table) for table in findings.tables],
        figures=[figure_fields(figure) for figure in findings.figures],
        settings=asdict(options),
        environment=describe_environment(),
        fingerprint=fingerprint(reproduction.name, options),
        seconds=seconds,
    )
    write_json(output / "result.json", asdict(result))
    return result


def table_fields(table: Table) -> dict[str, Any]:
    """A table as `result.json` keeps it."""
    return {
        "name": table.name,
        "title": table.title,
        "note": table.note,
        "headers": list(map(str, table.frame.columns)),
        "rows": cells(table),
        "right": numeric(table),
    }


def figure_fields(figure: Figure) -> dict[str, Any]:
    """A figure as `result.json` keeps it."""
    words = {"name": figure.name, "title": figure.title, "caption": figure.caption}
    return words | {"specification": page_specification(figure)}


def read_result(path: Path) -> Result | None:
    """The result in a folder, or None if it is missing or incomplete."""
    try:
        values = json.loads((path / "result.json").read_text())
        claims = list(map(as_claim, values["claims"]))
        known = {field.name for field in fields(Result)}
        return Result(**{key: values[key] for key in known if key != "claims"}, claims=claims)
    except (OSError, ValueError, KeyError, TypeError):
        return None
