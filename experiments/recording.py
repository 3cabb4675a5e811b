"""Where a run's figures go while it works: its own file first, then the tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from experiments.config import RunConfig
from experiments.runs import MetricsFile, RunFolder
from experiments.tracking import track

Record = Callable[[dict[str, Any]], None]


@contextmanager
def recording(run: RunConfig, folder: RunFolder, main: bool) -> Iterator[Record]:
    """Yield the function that takes a line of metrics; it does nothing unless `main`."""
    if not main:
        yield lambda row: None
        return
    tracker = track(
        run.tracking,
        run_id=folder.id,
        name=folder.path.name,
        group=run.sweep,
        job_type=run.init.name,
        config=asdict(run),
        folder=folder.path.parent.parent,
    )
    with MetricsFile(folder.path / "metrics.jsonl") as metrics, tracker as log:

        def record(row: dict[str, Any]) -> None:
            metrics.append(row)
            log(row)

        yield record
