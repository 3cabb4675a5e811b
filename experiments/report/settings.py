"""Which settings differ between runs, and hence which runs may be averaged.

Runs of one method that differ in nothing but seeds form an *arm*. Only the runs of an arm are
averaged: two learning rates of one method are two arms, not one blurred one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .runs import Run

IGNORED = {
    "cache", "cache_dir", "experiment_name", "folder", "hydra", "measures", "output", "output_dir",
    "output_root", "outputs", "overwrite", "path", "paths", "resume", "run_id", "runtime", "sweep",
    "tracking",
}  # fmt: skip
MEASURED = ("metric", "n_test", "data_fingerprint")
RECORDED = ("model", "data", "steps", "learning_rate", "rank")


def settings_of(run: Run) -> dict[str, Any]:
    """The run's configuration as dotted keys, without seeds, paths, tracking and runtime."""
    config = run.result.get("config") or {}
    settings = {
        key: value for key, value in flatten(config) if not _is_ignored(key) and not is_seed(key)
    }
    # A configuration says the rest; where there is none, the result's own fields must do.
    recorded = MEASURED if config else MEASURED + RECORDED
    return settings | {key: run.result[key] for key in recorded if key in run.result}


def flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Walk nested mappings; lists and scalars are leaves."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def is_seed(key: str) -> bool:
    return any(p in ("seed", "seeds") or p.endswith("_seed") for p in key.split("."))


def _is_ignored(key: str) -> bool:
    # `model.path` says which model: only whole groups, and names of outputs, are left out.
    parts = key.split(".")
    return parts[0] in IGNORED or (parts[-1] in IGNORED and parts[-1] != "path")


def varying(runs: list[Run]) -> dict[str, list[Any]]:
    """Keys whose value differs among `runs` (or is missing in some), with the values."""
    seen: dict[str, dict[str, Any]] = {}
    settings = [settings_of(run) for run in runs]
    for key in dict.fromkeys(key for s in settings for key in s):
        values = {json.dumps(s.get(key), sort_keys=True, default=str): s.get(key) for s in settings}
        if len(values) > 1:
            seen[key] = values
    return {key: list(values.values()) for key, values in seen.items()}


def differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Settings that differ although a fair comparison holds them equal.

    The method and its options (`init`, `method`) may differ; so may seeds, paths and tracking.
    """
    return {
        key: values
        for key, values in varying(runs).items()
        if key.split(".")[0] not in ("init", "method")
    }


def arms_of(runs: list[Run]) -> dict[str, str]:
    """Map each run id to its arm: the method, and the settings in which its runs differ.

    >>> # pissa at two learning rates: "pissa · learning_rate=0.001", "pissa · learning_rate=0.002"
    """
    arms: dict[str, str] = {}
    for method in dict.fromkeys(run.method for run in runs):
        same = [run for run in runs if run.method == method]
        keys = list(varying(same))
        for run in same:
            settings = settings_of(run)
            suffix = ", ".join(f"{_short(key)}={settings.get(key)}" for key in keys)
            arms[run.run_id] = f"{method} · {suffix}" if suffix else method
    return arms


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def one_learning_rate(runs: list[Run]) -> bool:
    """Whether no method was tried at more than one learning rate."""
    rates: dict[str, set[float]] = {}
    for run in runs:
        rates.setdefault(run.method, set()).add(run.result.get("learning_rate"))
    return all(len(values) == 1 for values in rates.values())
