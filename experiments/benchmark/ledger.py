"""The results of a benchmark in `outputs/benchmark/<machine>/`, updated after every row.

`result.json` holds all figures and says whether the run finished; `performance.md` is the page, and
`benchmark.png`, `.svg` and `.html` are its picture.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from ..run.environment import cpu_name, describe_environment, version
from ..run.files import write_json, write_text
from .page import page_of
from .picture import picture_of
from .row import Row
from .schema import BenchmarkConfig

PICTURE = "benchmark"
BUSY = 2.0  # the load average above which other work shares the machine


def environment(settings: BenchmarkConfig) -> dict[str, Any]:
    """Return the machine, the versions and the date, as JSON types."""
    known = describe_environment()
    known["packages"]["peft"] = version("peft")
    shared = os.getloadavg()[0] > BUSY
    return known | {"device": settings.device, "date": date.today().isoformat(), "shared": shared}


def machine(known: dict[str, Any]) -> str:
    """Return a folder name for the GPU, or for the CPU with its threads."""
    gpu = known["gpu"] if known["device"].startswith("cuda") else None
    name = gpu or f"{cpu_name()} {known['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Ledger:
    """The rows measured so far, and their files."""

    def __init__(self, settings: BenchmarkConfig) -> None:
        self.settings = settings
        self.known = environment(settings)
        self.folder = Path(settings.outputs) / "benchmark" / machine(self.known)
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        # The benchmark itself keeps its threads busy.
        busy = os.getloadavg()[0] > BUSY + self.known["threads"]
        self.known["shared"] = self.known["shared"] or busy
        self._write("unfinished")

    def close(self, finished: bool) -> None:
        """Draw the picture. A finished run also writes its page where the settings say."""
        self._write("finished" if finished else "unfinished")
        drawing = picture_of(self.rows)
        if drawing is not None:
            for ending in ("png", "svg"):
                drawing.save(self.folder / f"{PICTURE}.{ending}", scale_factor=2)
            drawing.save(self.folder / f"{PICTURE}.html", inline=True)  # works offline
        if finished and self.settings.page is not None:
            page = Path(self.settings.page)
            write_text(page, page_of(self.rows, self.known, "finished"))
            if drawing is not None:
                shutil.copyfile(self.folder / f"{PICTURE}.png", page.parent / f"{PICTURE}.png")

    def _write(self, status: str) -> None:
        write_text(self.folder / "performance.md", page_of(self.rows, self.known, status))
        content = {
            "status": status,
            "settings": asdict(self.settings),
            "environment": self.known,
            "rows": [asdict(row) for row in self.rows],
        }
        write_json(self.folder / "result.json", content)
