"""Where a run's measurements go: `metrics.jsonl`, and a tracker that mirrors it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from experiments.config.schema import RunConfig
from experiments.run.folder import MetricsFile, RunFolder
from experiments.run.tracking import track

Record = Callable[[dict[str, Any]], None]


@contextmanager
def recording(
    run: RunConfig, folder: RunFolder, main: bool, keep: int
) -> Iterator[tuple[Record, Callable[[], int]]]:
    """Yield the function that takes a line of metrics, and the one that tells the file's size.

    A line goes to the file first, then to the tracker. The first `keep` bytes of the file are of an
    earlier process; the tracker, which begins anew, is told of them again.
    """
    if not main:
        yield (lambda row: None), (lambda: 0)
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
    with MetricsFile(folder.metrics_file, keep) as metrics, tracker as log:
        for row in metrics.earlier:
            log(row)

        def record(row: dict[str, Any]) -> None:
            metrics.append(row)
            log(row)

        yield record, lambda: metrics.size
