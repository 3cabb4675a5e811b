"""Presets for Hydra's launchers: other defaults for the plugins' own settings.

They are registered after the plugins' own, under the same names. Hydra would treat a YAML file in
`conf/hydra/launcher` as a clash with the plugin's schema, and warn at each start.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

THREADS = 4
OBJECT_STORE_BYTES = 78_643_200

PRESETS: dict[str, dict[str, Any]] = {
    # joblib gives each of n_jobs processes its share of the cores as threads.
    "joblib": {"n_jobs": "${jobs_at_once:}"},
    # Ray gives a task as many threads as CPUs, and restarts a killed one, which continues from its
    # checkpoint. Ray refuses a store size when it joins an existing cluster.
    "ray": {
        "ray": {
            "init": {"address": None, "object_store_memory": "${object_store:${.address}}"},
            "remote": {
                "num_cpus": "${threads_at_once:}",
                "num_gpus": "${gpus_a_job:}",
                "max_retries": 3,
            },
        }
    },
    # Slurm queues a run again that reaches its time limit; it continues from its checkpoint.
    "submitit_slurm": {
        "cpus_per_task": THREADS,
        "timeout_min": 240,
        "array_parallelism": 64,
        "max_num_timeout": 10,
    },
}


def register_launchers() -> None:
    """Merge the presets into the settings of the installed plugins."""
    for function in (jobs_at_once, threads_at_once, gpus_a_job, object_store):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
    Plugins.instance()  # registers the plugins' own
    store = ConfigStore.instance()
    installed = store.list("hydra/launcher")
    for name, preset in PRESETS.items():
        if f"{name}.yaml" in installed:
            node = OmegaConf.merge(store.load(f"hydra/launcher/{name}.yaml").node, preset)
            store.store(group="hydra/launcher", name=name, node=node)


def cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jobs_at_once() -> int:
    """One run per `THREADS` cores; at least two, since a parallel launcher was asked for."""
    return max(cores() // THREADS, 2)


def threads_at_once() -> int:
    """CPUs of one run, such that `jobs_at_once` of them fit."""
    return max(cores() // jobs_at_once(), 1)


def gpus_a_job() -> int:
    return 1 if torch.cuda.is_available() else 0


def object_store(address: str | None) -> int | None:
    """The least store that Ray accepts, since runs pass nothing through it; None when joining."""
    return OBJECT_STORE_BYTES if address is None else None
