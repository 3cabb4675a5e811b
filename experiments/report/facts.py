"""Model, data, budget, machine and the runs' own notes, as text."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from .arms import flatten
from .cells import listing, mantissa

RATES = 6  # that are listed; of more, the range


def facts(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """Labels with their values, for the head of the page."""
    items = []
    for key, label, show in (
        ("model", "Model", str),
        ("data", "Data", str),
        ("n_test", "Held out", lambda n: f"{int(n):,} examples"),
        ("metric", "Score", lambda m: str(m).replace("_", " ")),
        ("majority", "Majority class", lambda m: f"{100 * m:.1f} %"),
        ("steps", "Training", lambda n: f"{int(n):,} steps"),
        ("learning_rate", "Learning rate", lambda x: mantissa(x).replace("-", "\u2011")),
        ("rank", "Rank", lambda n: f"{n:g}"),
        ("seed", "Seeds", str),
    ):
        values = sorted(runs[key].dropna().unique())
        if len(values) > RATES and key == "learning_rate":
            items.append((label, f"{len(values)} from {show(values[0])} to {show(values[-1])}"))
        elif values:
            items.append((label, listing(show(value) for value in values)))
    machines = [machine(json.loads(text) or {}) for text in runs["environment"].unique()]
    if any(machines):
        items.append(("Machine", "; ".join(dict.fromkeys(filter(None, machines)))))
    seconds = runs["train_seconds"].sum()
    if seconds:
        time = f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
        items.append(("Training time", f"{time} in total"))
    return items


def machine(environment: dict[str, Any]) -> str:
    """The processor, its threads, the accelerator and the main versions, if recorded."""
    flat = {key.rsplit(".", 1)[-1].lower(): value for key, value in flatten(environment)}

    def first(*keys: str) -> str:
        return next((str(flat[k]) for k in keys if flat.get(k) not in (None, "", [])), "")

    parts = [first("gpu", "cuda_device", "device_name", "accelerator"), first("cpu", "processor")]
    if cores := first("threads", "num_threads", "torch_threads", "cpu_count", "cores"):
        parts.append(f"{cores} thread{'' if cores == '1' else 's'} a run")
    parts.append(first("platform", "system", "os").partition("-")[0])  # without the kernel
    for package in ("python", "torch"):
        if version := first(package, f"{package}_version"):
            parts.append(f"{package} {version}")
    if commit := first("git_commit", "commit", "git", "revision"):
        parts.append(f"commit {commit[:10]}{' with changes' if flat.get('git_dirty') else ''}")
    return ", ".join(filter(None, parts))


def notes(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """Each distinct note with the methods whose runs have it."""
    named: dict[str, dict[str, int]] = {}
    for (text, method), count in runs.groupby(["notes", "method"], sort=False).size().items():
        for note in json.loads(text) or []:
            methods = named.setdefault(str(note), {})
            methods[method] = methods.get(method, 0) + count
    return [
        (note, "all runs" if sum(methods.values()) == len(runs) else listing(methods))
        for note, methods in named.items()
    ]
