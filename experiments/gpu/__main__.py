"""`python -m experiments.gpu`: run the parts one after another and report."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..console import say
from . import report
from .parts import PARTS, TOTAL_SECONDS, Part, selected
from .process import run_in_process
from .record import Record
from .task import pick_device

SHORTEST = 5.0
"""A part needs at least this many seconds, because its imports alone take that long."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and return the exit status: 1 for wrong results, 2 for a wrong setting."""
    options = parser().parse_args(arguments)
    try:
        parts = selected(options.parts)
        device = pick_device(options.small)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    folder = options.output or Path("outputs/gpu") / re.sub(r"[^A-Za-z0-9.-]+", "_", name)
    folder.mkdir(parents=True, exist_ok=True)
    records = run_parts(parts, folder, options.small, options.seconds)
    report.write(folder, records, options.small)
    report.print_table(records, options.small)
    say(f"wrote {folder / 'report.md'} and {folder / 'report.json'}")
    return 1 if report.wrong_results(records) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m experiments.gpu", description="Check and measure lora_init on a GPU."
    )
    names = ", ".join(part.name for part in PARTS)
    made.add_argument("--parts", nargs="+", metavar="PART", help=f"some of {names}")
    made.add_argument("--small", action="store_true", help="tiny sizes, also on a CPU")
    made.add_argument("--output", type=Path, help="default: outputs/gpu/<GPU name>")
    made.add_argument(
        "--seconds", type=float, default=TOTAL_SECONDS, help="limit of all parts together"
    )
    return made


def run_parts(
    parts: Sequence[Part],
    folder: Path,
    small: bool,
    total: float,
    run: Callable[[Part, Path, bool, float], Record] = run_in_process,
) -> dict[str, Record]:
    """Run the parts and return their records. A part is skipped if too little time is left."""
    ends = time.monotonic() + total
    records: dict[str, Record] = {}
    for number, part in enumerate(parts, 1):
        left = ends - time.monotonic()
        if left < SHORTEST:
            record = Record(part.name, folder / f"{part.name}.json")
            record.end("skipped", f"{max(left, 0):.0f} s of the limit of all parts were left")
        else:
            limit = min(part.seconds, left)
            say(f"{number}/{len(parts)} {part.name} (at most {limit:.0f} s): {part.about}")
            record = run(part, folder, small, limit)
        took = "" if record.seconds is None else f" in {record.seconds:.0f} s"
        say(f"    {record.status}{took}, {len(record.rows)} rows. {record.message}".rstrip())
        for text in record.wrong:
            say(f"    WRONG: {text}", "red")
        records[part.name] = record
    return records


if __name__ == "__main__":
    sys.exit(main())
