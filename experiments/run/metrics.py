"""The measurements of a run: `metrics.jsonl`, and a tracker that mirrors it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ..config.run_config import RunConfig
from ..errors import DamagedFile
from .files import as_object, finite, read_regular
from .folder import RunFolder
from .tracking import track

Record = Callable[[dict[str, Any]], None]


class MetricsFile:
    """`metrics.jsonl`: one row per measurement, on disk before the next one is taken.

    A continued run keeps the first `keep` bytes; the rows after its checkpoint are cut off.

    Attributes:
        earlier: the rows that are kept.

    Raises:
        DamagedFile: the bytes to keep do not hold rows.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.earlier = read_metrics(path, keep) if keep else []
        self.file: TextIO = path.open("a")
        self.file.truncate(keep)

    @property
    def size(self) -> int:
        """Bytes, all of them on disk."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def append(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(finite(row)) + "\n")
        self.file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


def read_metrics(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """The rows in the first `size` bytes (None: in all) of a `metrics.jsonl`.

    Raises:
        DamagedFile: it is not a file, or a line is not a row with step and split.
    """
    try:
        lines = read_regular(path, links=False)[:size].split(b"\n")
        rows = [as_object(line) for line in lines if line]
        for number, row in enumerate(rows, start=1):
            if type(row.get("step")) is not int or not isinstance(row.get("split"), str):
                raise ValueError(f"row {number} has no step or no split")
    except (OSError, ValueError) as error:
        raise DamagedFile(path, error) from error
    return rows


@contextmanager
def recording(
    run: RunConfig, folder: RunFolder, main: bool, keep: int
) -> Iterator[tuple[Record, Callable[[], int]]]:
    """Yield the function that records a row, and the one that returns the file's size.

    A row goes to the file first, then to the tracker. The first `keep` bytes of the file are from
    an earlier process. The tracker's run is new, so it gets those rows again.
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
