"""Runs as tables: one row a run, one row a layer of a run, one row a logged step of a run.

These are what is written as Parquet, and what the charts draw from.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd

from .runs import Run

SCALARS = (
    "status", "model", "data", "metric", "score", "n_test", "majority", "loss_test",
    "init_seconds", "calibration_seconds", "train_seconds", "first_step_gradient_norm",
    "trainable_parameters", "total_parameters", "steps", "learning_rate", "rank",
)  # fmt: skip
STRUCTURED = ("init", "seeds", "notes", "environment", "config")


def runs_frame(runs: list[Run], arms: dict[str, str]) -> pd.DataFrame:
    """One row a run. Nested parts (configuration, environment) are JSON text."""
    rows = []
    for run in runs:
        gap = run.result.get("output_gap") or {}
        rows.append(
            _identity(run, arms)
            | {key: run.result.get(key) for key in SCALARS}
            | {"output_gap": gap.get("max_abs_logit"), "output_gap_kl": gap.get("kl")}
            | {"peak_memory_bytes": run.init.get("peak_memory_bytes")}
            | {"folder": str(run.folder)}
            | {key: json.dumps(run.result.get(key), default=str) for key in STRUCTURED}
        )
    return pd.DataFrame(rows)


def layers_frame(runs: list[Run], arms: dict[str, str]) -> pd.DataFrame:
    """One row per adapted layer of each run, with a `layer` label short enough for an axis."""
    rows = [
        _identity(run, arms) | {k: v for k, v in layer.items() if np.isscalar(v) or v is None}
        for run in runs
        for layer in run.init.get("layers") or []
    ]
    frame = pd.DataFrame(rows)
    if len(frame):
        names = list(dict.fromkeys(frame["name"]))
        order = {name: position for position, name in enumerate(names)}
        short = dict(zip(names, short_names(names), strict=True))
        frame["layer"] = frame["name"].map(short)
        frame["layer_order"] = frame["name"].map(order)
    return frame


def metrics_frame(runs: list[Run], arms: dict[str, str]) -> pd.DataFrame:
    """One row per line of each run's `metrics.jsonl`."""
    return pd.DataFrame([_identity(run, arms) | row for run in runs for row in run.metrics])


def short_names(names: list[str]) -> list[str]:
    """Drop the dotted parts that all names share at their start and their end.

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
    """How many leading parts are the same in all of them."""
    equal = (len(set(column)) == 1 for column in zip(*parts, strict=False))
    return sum(itertools.takewhile(bool, equal))


def _identity(run: Run, arms: dict[str, str]) -> dict[str, object]:
    return {
        "run_id": run.run_id,
        "arm": arms[run.run_id],
        "method": run.method,
        "seed": run.seed,
    }
