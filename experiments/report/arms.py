"""Which settings differ between runs, and hence which runs are compared and which averaged.

Runs of one method that differ only in seeds, learning rate and task (model and data) form an
*arm*: what is compared. Its runs at one learning rate are a *setting*: what is averaged. A method
at two ranks, or with two values of an option, is two arms.
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
RATES = ("training.learning_rate", "learning_rate")


def settings_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Each run's configuration as a row of dotted keys, without seeds, paths and tracking.

    Values are JSON text, so that they compare exactly; NaN where a run lacks the key.
    """
    rows = []
    for config, *recorded in runs[["config", *MEASURED, *RECORDED]].itertuples(index=False):
        settings = {
            key: json.dumps(value, sort_keys=True, default=str)
            for key, value in flatten(json.loads(config) or {})
            if not is_ignored(key) and not is_seed(key)
        }
        # Without a configuration, the result's own fields stand in for it.
        names = MEASURED if settings else MEASURED + RECORDED
        settings |= {k: json.dumps(v) for k, v in zip(names, recorded, strict=False) if v == v}
        rows.append(settings)
    return pd.DataFrame(rows, index=runs.index, dtype=object)


def flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted keys and values of nested mappings. Lists are values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def is_seed(key: str) -> bool:
    return any(p in ("seed", "seeds") or p.endswith("_seed") for p in key.split("."))


def is_ignored(key: str) -> bool:
    # `model.path` names the model, so that only whole groups and names of outputs are ignored.
    parts = key.split(".")
    return parts[0] in IGNORED or (parts[-1] in IGNORED and parts[-1] != "path")


def with_arms(runs: pd.DataFrame) -> pd.DataFrame:
    """Add the columns `task` (model and data, or the one that differs) and `arm`.

    An arm is named by its method, its rank, and the other settings that differ, such as
    "pissa · r=8, niter=4".
    """
    settings = settings_table(runs)
    model, data = runs["model"].astype(str), runs["data"].astype(str)
    task = data if model.nunique() == 1 else model if data.nunique() == 1 else model + " on " + data
    ranked = runs["rank"].nunique() > 1
    arm = pd.Series("", index=runs.index)
    for method, group in runs.groupby("method", sort=False):
        labels = [f"r={rank:g}" if ranked and rank == rank else "" for rank in group["rank"]]
        for key in free_settings(settings.loc[group.index], group.assign(task=task)):
            short = key.rsplit(".", 1)[-1]
            values = settings.loc[group.index, key].fillna("none").str.strip('"')
            labels = [
                f"{label}, {short}={value}".lstrip(", ")
                for label, value in zip(labels, values, strict=True)
            ]
        arm[group.index] = [f"{method} · {label}" if label else method for label in labels]
    return runs.assign(task=task, arm=arm)


def free_settings(settings: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """Keys that differ between runs of one method at equal task, rank and learning rate.

    Keys that follow from these three, such as an alpha of twice the rank, are not free.
    """
    axes = [runs["task"], runs["rank"].fillna(0), runs["learning_rate"].fillna(0)]
    differing = [key for key in settings if settings[key].nunique(dropna=False) > 1]
    grouped = settings[differing].fillna("").groupby(axes)
    return [key for key in differing if grouped[key].nunique().max() > 1]


def differences(runs: pd.DataFrame) -> dict[str, list[Any]]:
    """Settings that differ between methods although a fair comparison keeps them equal.

    Three kinds may differ: the method's own options; a setting for which every method was tried
    with the same values; and learning rates, if each method was tried at several. Controls differ
    on purpose.
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
        if several and (tried.nunique() == 1 or key in RATES):
            continue
        unfair[key] = [None if v != v else json.loads(v) for v in values]
    return unfair


def without_rank(arm: str) -> str:
    """The arm's name without its rank, which a line over ranks joins.

    >>> without_rank("pissa · r=8, niter=4")
    'pissa · niter=4'
    """
    return re.sub(r" · $", "", re.sub(r"(?<= · )r=[^,]+(, )?", "", arm))
