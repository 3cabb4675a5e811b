"""A job's configuration, as Hydra composed it, as the run it describes."""

from __future__ import annotations

import copy

from omegaconf import DictConfig, open_dict, read_write

from experiments.config.schema import RunConfig, resolve


def run_of(config: DictConfig) -> RunConfig:
    """The run that Hydra would hand to the application; `config` still has its `hydra` part.

    Raises:
        ConfigurationError: as of `resolve`.
    """
    composed = copy.deepcopy(config)
    with open_dict(composed), read_write(composed):
        del composed["hydra"]  # as Hydra itself does before it calls the job
    return resolve(composed)
