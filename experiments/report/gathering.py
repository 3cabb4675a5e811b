"""All runs of a sweep as tables, kept as Parquet: a run that has not changed is not read again.

The tables in the report's folder are the cache. A run is known there by its folder, and by the size
and the modification time of its `result.json`, which is written once and last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.run.files import scratch_path

from .frames import layer_rows, metric_rows, run_row, runs_frame
from .runs import Problem, Run, read_run
from .sweeps import Sweep, check_entry

FORMAT = "5"  # of the tables; tables of another format are made again
TABLES = ("layers", "metrics", "runs")  # runs last: what it lists is complete in the others


@dataclass(frozen=True)
class Gathered:
    """The tables of a sweep's runs, and everything that went wrong while reading them."""

    runs: pd.DataFrame
    layers: pd.DataFrame
    metrics: pd.DataFrame
    problems: list[Problem]
    reused: int


def gather(sweep: Sweep, cache: Path, progress: Callable[[str], None]) -> Gathered:
    """Read what is new in `sweep`, take the rest from the tables in `cache`, and write them."""
    kept = read_tables(cache)
    known = {row[0]: row for row in kept["runs"][["folder", "stamp", "run_id", "gaps"]].values}
    problems, fresh, reused = list(sweep.problems), Fresh(), set()
    seen: dict[str, str] = {}
    for number, entry in enumerate(sweep.entries):
        if number % 100 == 0:
            progress(f"reading runs: {number:,} of {len(sweep.entries):,}")
        try:
            check_entry(entry)
            folder, stamp = str(entry.folder), stamp_of(entry.folder)
            hit = known.get(folder)
            if hit is not None and hit[1] == stamp:
                run_id, gaps, add = hit[2], hit[3], lambda hit=hit: reused.add(hit[2])
            else:
                run, found = read_run(entry.folder)
                gaps = json.dumps([[gap.run, gap.reason] for gap in found])
                run_id = run.run_id
                rows = Rows.of(run, stamp, gaps)
                add = lambda rows=rows: fresh.add(rows)  # noqa: E731
        except Exception as error:  # whatever is odd about one run, the others are shown
            told = str(error) if isinstance(error, ValueError | OSError) else repr(error)
            problems.append(Problem(entry.label, told))
            continue
        if run_id in seen:
            reason = f"the same run as {seen[run_id]}, which is read instead"
            problems.append(Problem(folder, reason, fatal=False))
            continue
        seen[run_id] = folder
        add()
        problems += [Problem(*gap, fatal=False) for gap in json.loads(gaps)]
    progress("writing tables")
    tables = join(kept, reused, fresh)
    if fresh.runs or len(reused) != len(kept["runs"]):
        write_tables(tables, cache)
    return Gathered(**tables, problems=problems, reused=len(reused))


@dataclass(frozen=True)
class Rows:
    """One run's rows of every table."""

    run: dict[str, Any]
    layers: list[dict[str, Any]]
    metrics: list[dict[str, Any]]

    @classmethod
    def of(cls, run: Run, stamp: str, gaps: str) -> Rows:
        row = {**run_row(run), "stamp": stamp, "gaps": gaps}
        return cls(row, list(layer_rows(run)), list(metric_rows(run)))


class Fresh:
    """The rows of the runs that were read for this report."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.layers: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []

    def add(self, rows: Rows) -> None:
        self.runs.append(rows.run)
        self.layers += rows.layers
        self.metrics += rows.metrics


def stamp_of(folder: Path) -> str:
    """Size and modification time of the result; empty where there is none, which is no match."""
    try:
        facts = os.stat(folder / "result.json")
    except OSError:
        return ""
    return f"{facts.st_size} {facts.st_mtime_ns}"


def join(kept: dict[str, pd.DataFrame], reused: set[str], fresh: Fresh) -> dict[str, pd.DataFrame]:
    """The reused rows and the fresh ones, in one table each."""
    made = {
        "runs": runs_frame(fresh.runs) if fresh.runs else pd.DataFrame(),
        "layers": pd.DataFrame(fresh.layers),
        "metrics": pd.DataFrame(fresh.metrics),
    }
    joined = {}
    for name in TABLES:
        old = kept[name]
        old = old[old["run_id"].isin(reused)] if len(old) else old
        parts = [part for part in (old, made[name]) if len(part)]
        joined[name] = pd.concat(parts, ignore_index=True) if parts else made[name]
    return joined


def read_tables(cache: Path) -> dict[str, pd.DataFrame]:
    """The tables of the last report; empty ones where there are none of this format."""
    empty = pd.DataFrame(columns=["run_id", "folder", "stamp", "gaps"])
    found = {}
    for name in TABLES:
        try:
            table = pq.read_table(cache / f"{name}.parquet")
        except (OSError, ValueError, pa.ArrowException):
            return dict.fromkeys(TABLES, empty)
        if (table.schema.metadata or {}).get(b"format") != FORMAT.encode():
            return dict.fromkeys(TABLES, empty)
        found[name] = table.to_pandas()
    known = set(empty.columns) <= set(found["runs"].columns)
    return found if known else dict.fromkeys(TABLES, empty)


def write_tables(tables: dict[str, pd.DataFrame], cache: Path) -> None:
    """Write each table completely or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        table = pa.Table.from_pandas(tables[name], preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), "format": FORMAT})
        scratch = scratch_path(cache / f"{name}.parquet")
        try:
            pq.write_table(table, scratch)
            os.replace(scratch, cache / f"{name}.parquet")
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
