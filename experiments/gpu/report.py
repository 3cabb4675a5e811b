"""All records as one JSON file, one Markdown page and one table on the console."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rich
from rich.table import Table

from lora_init.files import write_atomically

from .expectations import expected_seconds, verdicts
from .parts import PARTS
from .record import Record

SMALL = "This is the small form: its times mean nothing."
ANSWER = {True: "yes", False: "NO", None: "not judged"}
Records = dict[str, Record]


def wrong_results(records: Records) -> list[str]:
    return [f"{name}: {text}" for name, record in records.items() for text in record.wrong]


def write(folder: Path, records: Records, small: bool = False) -> None:
    """Write report.json and report.md."""
    for row in records["methods"].rows if "methods" in records else ():
        method, _, rank = row["name"].partition(" r=")
        if row.get("blocks") and rank.isdigit():
            row["expected_seconds"] = expected_seconds(method, int(rank))
    whole = {
        "small": small,
        "goals": verdicts(records, small),
        "wrong": wrong_results(records),
        "parts": {name: record.to_dict() for name, record in records.items()},
    }
    texts = {"report.json": json.dumps(whole, indent=1), "report.md": page(records, small)}
    for name, text in texts.items():
        write_atomically(folder / name, lambda path, text=text: path.write_text(text))


def page(records: Records, small: bool = False) -> str:
    """The Markdown page."""
    lines = ["# lora_init on a GPU", ""]
    lines += [SMALL, ""] if small else []
    wrong = wrong_results(records)
    lines += ["Wrong results:", "", *(f"- {text}" for text in wrong), ""] if wrong else []
    lines += ["## Goals", "", *markdown(verdicts(records, small)), "", "## Parts", ""]
    lines += [*markdown(part_rows(records)), ""]
    for part in PARTS:
        if part.name not in records:
            continue
        record = records[part.name]
        lines += [f"## {part.name}", "", part.about, ""]
        lines += [f"- {note}" for note in record.notes] + [""] * bool(record.notes)
        lines += [*markdown(record.rows), ""] if record.rows else []
        lines += waits(record)
    return "\n".join(lines).rstrip() + "\n"


def part_rows(records: Records) -> list[dict[str, Any]]:
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
    """A table of all columns except mappings."""
    cells = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows]
    columns = list(dict.fromkeys(key for row in cells for key in row))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in cells:
        texts = [shown(row.get(column)).replace("|", "\\|") for column in columns]
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def waits(record: Record) -> list[str]:
    """The lines of lora_init that wait for the device, for each row that has them."""
    lines = [
        f"- {row['name']}: " + ", ".join(f"{k} {v}" for k, v in row["waits_by_line"].items())
        for row in record.rows
        if row.get("waits_by_line")
    ]
    return ["Waits for the device, by line of lora_init:", "", *lines, ""] if lines else []


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else " ".join(str(value).split())


def print_table(records: Records, small: bool = False) -> None:
    """Print parts, goals and wrong results."""
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
        found = "" if goal["found"] is None else f"; found {shown(goal['found'])}"
        table.add_row(goal["goal"], ANSWER[goal["met"]], "", f"{goal['wanted']}{found}")
    console = rich.get_console()
    console.print(table, markup=False)
    for text in wrong_results(records):
        console.print(f"WRONG: {text}", style="red", markup=False, highlight=False)
