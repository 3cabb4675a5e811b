"""All runs of a sweep as tables, cached as Parquet files: an unchanged run is not read again.

The tables in the report's folder are the cache. Its key is a run's folder with the size and the
modification time of its `result.json`, which is written once and last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lora_init.files import write_atomically

from .frames import layer_rows, metric_rows, run_row, runs_frame
from .runs import Problem, read_run
from .sweeps import Sweep, finished_folder

FORMAT = "6"  # of the tables; tables of another format are read again from the runs
TABLES = ("layers", "metrics", "runs")  # runs last: the other tables have every run that it lists
KEYS = ["run_id", "folder", "stamp", "gaps"]


@dataclass(frozen=True)
class Gathered:
    """The tables of a sweep's runs, and everything that went wrong while reading them."""

    runs: pd.DataFrame
    layers: pd.DataFrame
    metrics: pd.DataFrame
    problems: list[Problem]
    reused: int


def gather(sweep: Sweep, cache: Path, progress: Callable[[str], None]) -> Gathered:
    """Read the new runs of `sweep`, take the others from the tables in `cache`, and update those.

    Runs that cannot be read are among the problems.
    """
    kept = read_tables(cache)
    known = {row.folder: row for row in kept["runs"][KEYS].itertuples(index=False)}
    problems, reused = list(sweep.problems), set()
    fresh: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    seen: dict[str, str] = {}
    for number, entry in enumerate(sweep.entries):
        if number % 100 == 0:
            progress(f"reading runs: {number:,} of {len(sweep.entries):,}")
        try:
            path = finished_folder(entry)
            folder, stamp = str(path), stamp_of(path)
            hit = known.get(folder)
            if hit is not None and hit.stamp == stamp:
                run_id, gaps, rows = hit.run_id, json.loads(hit.gaps), None
            else:
                run, found = read_run(path)
                run_id, gaps = run.run_id, [[gap.run, gap.reason] for gap in found]
                row = {**run_row(run), "stamp": stamp, "gaps": json.dumps(gaps)}
                rows = {"runs": [row], "layers": [*layer_rows(run)], "metrics": [*metric_rows(run)]}
        except Exception as error:  # no damage of one run may cost the others
            reason = str(error) if isinstance(error, ValueError | OSError) else repr(error)
            problems.append(Problem(entry.label, reason))
            continue
        if run_id in seen:
            reason = f"the same run as {seen[run_id]}, which is read instead"
            problems.append(Problem(folder, reason, fatal=False))
            continue
        seen[run_id] = folder
        if rows is None:
            reused.add(run_id)
        else:
            for name in TABLES:
                fresh[name] += rows[name]
        problems += [Problem(*gap, fatal=False) for gap in gaps]
    progress("writing tables")
    tables = join(kept, reused, fresh)
    if fresh["runs"] or len(reused) != len(kept["runs"]):
        write_tables(tables, cache)
    return Gathered(**tables, problems=problems, reused=len(reused))


def stamp_of(folder: Path) -> str:
    """Size and modification time of the result; empty if there is none, which never matches."""
    try:
        facts = os.stat(folder / "result.json")
    except OSError:
        return ""
    return f"{facts.st_size} {facts.st_mtime_ns}"


def join(
    kept: dict[str, pd.DataFrame], reused: set[str], fresh: dict[str, list[dict[str, Any]]]
) -> dict[str, pd.DataFrame]:
    """The reused rows and the fresh ones in one table each."""
    joined = {}
    for name in TABLES:
        rows = fresh[name]
        made = runs_frame(rows) if name == "runs" and rows else pd.DataFrame(rows)
        old = kept[name][kept[name]["run_id"].isin(reused)] if len(kept[name]) else kept[name]
        parts = [part for part in (old, made) if len(part)]
        joined[name] = pd.concat(parts, ignore_index=True) if parts else made
    return joined


def read_tables(cache: Path) -> dict[str, pd.DataFrame]:
    """The tables of the last report; empty ones if any is missing, damaged or of another format."""
    empty = {name: pd.DataFrame(columns=KEYS) for name in TABLES}
    found: dict[str, pd.DataFrame] = {}
    for name in TABLES:
        try:
            table = pq.read_table(cache / f"{name}.parquet")
        except (OSError, ValueError, pa.ArrowException):
            return empty
        if (table.schema.metadata or {}).get(b"format") != FORMAT.encode():
            return empty
        found[name] = table.to_pandas()
    return found if set(KEYS) <= set(found["runs"].columns) else empty


def write_tables(tables: dict[str, pd.DataFrame], cache: Path) -> None:
    """Write each table atomically."""
    cache.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        table = pa.Table.from_pandas(tables[name], preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), "format": FORMAT})
        write = partial(pq.write_table, table)
        write_atomically(cache / f"{name}.parquet", write)
