"""Which settings differ between runs, and hence which runs may be averaged.

Runs of one method that differ in nothing but seeds, learning rate and task (model and data) form an
*arm*: what is compared. Its runs at one learning rate are a *setting*: what is averaged. A method
at two ranks, or with two values of an option, is two arms, not one blurred one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

IGNORED = {
    "cache", "cache_dir", "experiment_name", "folder", "hydra", "measures", "output", "output_dir",
    "output_root", "outputs", "overwrite", "path", "paths", "read_test", "resume", "run_id",
    "runtime", "sweep", "tracking",
}  # fmt: skip
MEASURED = ("metric", "n_test")
RECORDED = ("model", "data", "steps", "learning_rate", "rank")
RATE = "training.learning_rate"


def settings_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Each run's configuration as a row of dotted keys, without seeds, paths and tracking.

    Values are their JSON text, NaN where a run has no such key, so that they compare exactly.
    """
    rows = []
    for config, *recorded in runs[["config", *MEASURED, *RECORDED]].itertuples(index=False):
        settings = {
            key: json.dumps(value, sort_keys=True, default=str)
            for key, value in flatten(json.loads(config) or {})
            if not is_ignored(key) and not is_seed(key)
        }
        # A configuration says the rest; where there is none, the result's own fields must do.
        names = (MEASURED + RECORDED)[: len(MEASURED) if settings else None]
        settings |= {k: json.dumps(v) for k, v in zip(names, recorded, strict=False) if v == v}
        rows.append(settings)
    return pd.DataFrame(rows, index=runs.index, dtype=object)


def flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Walk nested mappings; lists and scalars are leaves."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def is_seed(key: str) -> bool:
    return any(p in ("seed", "seeds") or p.endswith("_seed") for p in key.split("."))


def is_ignored(key: str) -> bool:
    # `model.path` says which model: only whole groups, and names of outputs, are left out.
    parts = key.split(".")
    return parts[0] in IGNORED or (parts[-1] in IGNORED and parts[-1] != "path")


def with_arms(runs: pd.DataFrame) -> pd.DataFrame:
    """Add the columns `task` (model and data, or which of them differs) and `arm` (method, rank,
    what else differs).

    >>> # pissa at two ranks: "pissa · r=8", "pissa · r=32"
    """
    settings = settings_table(runs)
    model, data = runs["model"].astype(str), runs["data"].astype(str)
    task = data if model.nunique() == 1 else model if data.nunique() == 1 else model + " on " + data
    ranked = runs["rank"].nunique() > 1
    arm = pd.Series("", index=runs.index)
    for method, group in runs.groupby("method", sort=False):
        keys = free_settings(settings.loc[group.index], group.assign(task=task))
        named = [f"r={rank:g}" if ranked and rank == rank else "" for rank in group["rank"]]
        for key in keys:
            values = zip(named, settings.loc[group.index, key], strict=True)
            named = [f"{name}, {short(key)}={told(v)}".lstrip(", ") for name, v in values]
        arm[group.index] = [f"{method} · {suffix}" if suffix else method for suffix in named]
    return runs.assign(task=task, arm=arm)


def free_settings(settings: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """Keys that differ between runs of one method at equal task, rank and learning rate.

    Those that follow from these three (an alpha of twice the rank, say) tell nothing new.
    """
    axes = [runs["task"], runs["rank"].fillna(0), runs["learning_rate"].fillna(0)]
    differing = [key for key in settings if settings[key].nunique(dropna=False) > 1]
    grouped = settings[differing].fillna("").groupby(axes)
    return [key for key in differing if grouped[key].nunique().max() > 1]


def differences(runs: pd.DataFrame) -> dict[str, list[Any]]:
    """Settings that differ between methods although a fair comparison holds them equal.

    The method and its options (`init`, `method`) may differ; so may seeds, paths and tracking; so
    may a setting that every method was tried at with the same values, and learning rates that
    each method was given several of. Controls differ on purpose.
    """
    runs = runs[~runs["is_control"]]
    settings = settings_table(runs)
    unfair = {}
    for key in settings:
        values = settings[key].drop_duplicates()
        if len(values) < 2 or key.split(".")[0] in ("init", "method"):
            continue
        tried = settings[key].fillna("").groupby(runs["method"]).agg(frozenset)
        several = tried.map(len).min() > 1
        if (tried.nunique() == 1 and several) or (key in (RATE, "learning_rate") and several):
            continue
        unfair[key] = [None if v != v else json.loads(v) for v in values]
    return unfair


def without_rank(arm: str) -> str:
    """The arm's name without its rank: what a line over ranks joins.

    >>> without_rank("pissa · r=8, niter=4")
    'pissa · niter=4'
    """
    return re.sub(r" · $", "", re.sub(r"(?<= · )r=[^,]+(, )?", "", arm))


def told(value: Any) -> str:
    """A setting's JSON text as a label shows it."""
    return "none" if value != value else value.strip('"')


def short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def rates_per_arm(runs: pd.DataFrame) -> pd.Series:
    """How many learning rates each arm was tried at on each task, by (task, arm)."""
    return runs.groupby(["task", "arm"])["learning_rate"].nunique()
