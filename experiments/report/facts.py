"""Model, data, budget, machine and the runs' own notes, in words."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from .arms import flatten
from .findings import distinct, listing, mantissa


def facts(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """Model, data, budget and machine, in words."""
    items = []
    for key, label, show in (
        ("model", "Model", str),
        ("data", "Data", str),
        ("n_test", "Held out", lambda n: f"{int(n):,} examples"),
        ("metric", "Score", lambda m: str(m).replace("_", " ")),
        ("steps", "Training", lambda n: f"{int(n):,} steps"),
        ("learning_rate", "Learning rate", lambda x: mantissa(x).replace("-", "\u2011")),
        ("rank", "Rank", lambda n: f"{n:g}"),
    ):
        values = sorted(runs[key].dropna().unique())
        if len(values) > 6 and label == "Learning rate":
            items.append((label, f"{len(values)} from {show(values[0])} to {show(values[-1])}"))
        elif values:
            items.append((label, listing([show(v) for v in values])))
    items.append(("Seeds", listing([str(s) for s in sorted(runs["seed"].unique())])))
    environments = [json.loads(text) for text in runs["environment"].unique()]
    machines = distinct(machine(environment or {}) for environment in environments)
    if machines:
        items.append(("Machine", "; ".join(machines)))
    seconds = runs["train_seconds"].sum()
    if seconds:
        time = f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
        items.append(("Training time", f"{time} in all"))
    return items


def machine(environment: dict[str, Any]) -> str | None:
    """The processor, its threads, the accelerator and the versions that matter, if recorded."""
    flat = {key.rsplit(".", 1)[-1].lower(): value for key, value in flatten(environment)}

    def first(*keys: str) -> str | None:
        return next((str(flat[k]) for k in keys if flat.get(k) not in (None, "", [])), None)

    parts = [first("gpu", "cuda_device", "device_name", "accelerator"), first("cpu", "processor")]
    cores = first("threads", "num_threads", "torch_threads", "cpu_count", "cores")
    parts.append(f"{cores} thread{'' if cores == '1' else 's'} a run" if cores else None)
    system = first("platform", "system", "os")
    parts.append(system and system.partition("-")[0])  # "Linux-6.1.0-…": the kernel is in the run
    for package in ("python", "torch"):
        version = first(package, f"{package}_version")
        parts.append(f"{package} {version}" if version else None)
    commit = first("git_commit", "commit", "git", "revision")
    changed = " with changes" if flat.get("git_dirty") else ""
    parts.append(f"commit {commit[:10]}{changed}" if commit else None)
    return ", ".join(part for part in parts if part) or None


def notes(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """Each distinct note with the methods it was made for."""
    named: dict[str, dict[str, int]] = {}
    for (text, method), count in runs.groupby(["notes", "method"], sort=False).size().items():
        for note in json.loads(text) or []:
            methods = named.setdefault(str(note), {})
            methods[method] = methods.get(method, 0) + count
    return [
        (note, "all runs" if sum(methods.values()) == len(runs) else listing(list(methods)))
        for note, methods in named.items()
    ]
