"""The command `python -m experiments.status SWEEP [--watch | --json]`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from .sweep.status.page import as_json, as_page
from .sweep.status.survey import find_sweep, survey

INTERVAL = 2.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.status",
        description="The state of a sweep: running, finished, failed and missing runs, time left.",
    )
    parser.add_argument(
        "sweep", metavar="SWEEP", help="its folder, or its name under outputs/sweeps"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--watch", action="store_true", help="live, until it is done or Ctrl-C")
    shown.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    try:
        folder = find_sweep(options.sweep)
    except FileNotFoundError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[red]error:[/red] {escape(str(error))}")
        return 1
    if options.json:
        print(json.dumps(as_json(survey(folder)), indent=2))
    elif options.watch:
        watch(folder)
    else:
        Console().print(as_page(survey(folder)))
    return 0


def watch(folder: Path) -> None:
    """Update the page until no run is at work or waiting to start."""
    try:
        with Live(as_page(found := survey(folder)), console=Console()) as live:
            while any(line.state in ("running", "missing") for line in found.lines):
                time.sleep(INTERVAL)
                live.update(as_page(found := survey(folder)))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    sys.exit(main())
