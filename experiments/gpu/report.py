"""All records as one JSON file, one Markdown page and one table on the console."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import rich
from rich.table import Table

from experiments.gpu.expected import seconds as expected_seconds
from experiments.gpu.goals import verdicts
from experiments.gpu.parts import PARTS
from experiments.gpu.record import Record

SMALL = "This is the small form: its times mean nothing."
ANSWER = {True: "yes", False: "NO", None: "not judged"}


def wrong_results(records: dict[str, Record]) -> list[str]:
    return [f"{name}: {text}" for name, record in records.items() for text in record.wrong]


def write(folder: Path, records: dict[str, Record], small: bool = False) -> None:
    """Write report.json and report.md; each appears whole."""
    with_expectations(records)
    whole = {
        "small": small,
        "goals": verdicts(records, small),
        "wrong": wrong_results(records),
        "parts": {name: record.to_dict() for name, record in records.items()},
    }
    for name, text in (("json", json.dumps(whole, indent=1)), ("md", page(records, small))):
        temporary = folder / f"report.{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, folder / f"report.{name}")


def with_expectations(records: dict[str, Record]) -> None:
    """Put the estimate of docs/gpu.md into the rows of methods on Llama-2-7B's shapes."""
    for row in records["methods"].rows if "methods" in records else ():
        method, _, rank = row["name"].partition(" r=")
        if row.get("blocks") and rank in ("16", "128"):
            row["expected_seconds"] = expected_seconds(method, int(rank))


def page(records: dict[str, Record], small: bool = False) -> str:
    """The Markdown page."""
    lines = ["# lora_init on a GPU", ""]
    lines += [SMALL, ""] if small else []
    wrong = wrong_results(records)
    lines += ["Wrong results:", "", *(f"- {text}" for text in wrong), ""] if wrong else []
    lines += ["## Goals", "", *markdown(verdicts(records, small)), "", "## Parts", ""]
    lines += [*markdown(part_rows(records)), ""]
    for part in PARTS:
        record = records.get(part.name)
        if record is None:
            continue
        lines += [f"## {part.name}", "", part.about, ""]
        lines += [f"- {note}" for note in record.notes] + [""] * bool(record.notes)
        lines += [*markdown(record.rows), ""] if record.rows else []
        lines += waits(record)
    return "\n".join(lines).rstrip() + "\n"


def part_rows(records: dict[str, Record]) -> list[dict[str, Any]]:
    return [
        {
            "part": name,
            "status": record.status,
            "seconds": record.seconds,
            "rows": len(record.rows),
            "failed": sum("failed" in row for row in record.rows),
            "wrong": len(record.wrong),
            "message": record.message,
        }
        for name, record in records.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """A table of all columns that are not mappings."""
    columns = list(
        dict.fromkeys(
            key for row in rows for key, value in row.items() if not isinstance(value, dict)
        )
    )
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [shown(row.get(column)).replace("|", "\\|") for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def waits(record: Record) -> list[str]:
    """The lines of our source that wait for the device, for each row that has them."""
    listed = [
        (row["name"], row["waits_by_line"]) for row in record.rows if row.get("waits_by_line")
    ]
    if not listed:
        return []
    lines = ["Waits for the device, by line of lora_init:", ""]
    for name, counts in listed:
        told = ", ".join(f"{line} {count}" for line, count in counts.items())
        lines.append(f"- {name}: {told}")
    return [*lines, ""]


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return " ".join(str(value).split())


def print_table(records: dict[str, Record], small: bool = False) -> None:
    """Parts and goals, on one screen."""
    table = Table(title="lora_init on a GPU", caption=SMALL if small else None)
    for column in ("what", "result", "seconds", "remarks"):
        table.add_column(column, overflow="fold")
    for row in part_rows(records):
        remarks = [
            f"{row['rows']} rows",
            f"{row['failed']} failed" if row["failed"] else "",
            f"{row['wrong']} WRONG" if row["wrong"] else "",
            row["message"],
            *records[row["part"]].notes,
        ]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        table.add_row(row["part"], row["status"], seconds, "; ".join(filter(None, remarks)))
    table.add_section()
    for goal in verdicts(records, small):
        found = "" if goal["found"] is None else f"found {shown(goal['found'])}"
        table.add_row(
            goal["goal"], ANSWER[goal["met"]], "", f"{goal['wanted']}; {found}".strip("; ")
        )
    console = rich.get_console()
    console.print(table, markup=False)
    for text in wrong_results(records):
        console.print(f"WRONG: {text}", style="red", markup=False, highlight=False)
