"""Runs as rows of three tables: one per run, per layer of a run, and per logged step of a run.

The tables are saved as Parquet, and the charts are drawn from them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

import pandas as pd

from .runs import Run
from .validation import NUMBERS

RESULT = ("model", "data", "metric", "tested", *NUMBERS)
START = (
    "norm_A", "norm_B", "relative_norm", "calibration_tokens", "first_step_error",
    "added_memory_bytes",
)  # fmt: skip
END = ("update_size", "forgetting", "intruder_dimensions", "angle_A", "angle_B")
NESTED = ("init", "notes", "environment", "config")
MEASURED = (*NUMBERS, *START, *END, "output_gap", "output_gap_kl")


def run_row(run: Run) -> dict[str, Any]:
    """A row of the table of runs. Nested parts (configuration, environment) are JSON text."""
    result = run.result
    gap, start, end = (result.get(key) or {} for key in ("output_gap", "start", "end"))
    row = identity(run)
    row.update((key, result.get(key)) for key in RESULT)
    row.update((key, start.get(key)) for key in START)
    row.update((key, end.get(key)) for key in END)
    row["output_gap"], row["output_gap_kl"] = gap.get("max_abs_logit"), gap.get("kl")
    row["is_control"] = run.is_control
    row["from_cache"] = any(
        (layer.get("details") or {}).get("from_cache") for layer in run.init.get("layers") or []
    )
    row["forgetting_kind"] = end.get("forgetting_kind")
    row["folder"] = str(run.folder)
    row.update((key, json.dumps(result.get(key), default=str)) for key in NESTED)
    return row


def layer_rows(run: Run) -> Iterable[dict[str, Any]]:
    """One row per adapted layer: its start, and how training changed it."""
    ends = {layer.get("name"): layer for layer in run.end.get("layers") or []}
    names = identity(run)
    for layer in run.init.get("layers") or []:
        merged = {**layer, **ends.get(layer["name"], {}), **names}
        yield {k: v for k, v in merged.items() if not isinstance(v, (list, dict))}


def metric_rows(run: Run) -> Iterable[dict[str, Any]]:
    """One row per line of `metrics.jsonl`."""
    names = identity(run)
    return ({**row, **names} for row in run.metrics)


def identity(run: Run) -> dict[str, Any]:
    return {"run_id": run.run_id, "method": run.method, "seed": run.result["seed"]}


def runs_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of runs as a table. Its measured columns are numbers even if no run has a value."""
    frame = pd.DataFrame(rows)
    numbers = {key: pd.to_numeric(frame[key], errors="coerce").astype(float) for key in MEASURED}
    return frame.assign(**numbers, tested=frame["score"].notna())


def short_names(names: list[str]) -> list[str]:
    """Drop the dotted parts that all names share at the start and at the end.

    >>> short_names(["encoder.layer.0.query", "encoder.layer.1.key"])
    ['0.query', '1.key']
    """
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return names
    start = shared_parts(parts)
    end = shared_parts([p[start:][::-1] for p in parts])
    short = [".".join(p[start : len(p) - end]) for p in parts]
    return short if all(short) and len(set(short)) == len(set(names)) else names


def shared_parts(parts: list[list[str]]) -> int:
    """The number of leading parts that are equal in all names."""
    equal = (len(set(column)) == 1 for column in zip(*parts, strict=False))
    return sum(itertools.takewhile(bool, equal))
