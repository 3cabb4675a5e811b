"""Which jobs a multirun will launch, by Hydra's own expansion of its overrides."""

from __future__ import annotations

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from ..config.store import leave_out_unsupplied
from ..console import say


def decided_ahead(config: DictConfig) -> bool:
    """Whether all jobs are known before the first. Other sweepers choose by results."""
    return str(config.hydra.sweeper._target_).endswith("BasicSweeper")


def by_return_value(config: DictConfig) -> bool:
    """Whether the sweeper reads results from return values; the protocol reads runs' folders."""
    return not str(config.hydra.sweeper._target_).startswith("hydra_plugins.lora_init")


def asked_overrides(config: DictConfig) -> list[str]:
    """The overrides of the command line and of `hydra.sweeper.params`."""
    parameters = config.hydra.sweeper.get("params") or {}
    return [f"{key}={value}" for key, value in parameters.items()] + list(
        config.hydra.overrides.task
    )


def skip_unsupplied(config: DictConfig) -> None:
    """Take methods that lack an input out of `init=glob(…)`, and name them."""
    if any(override.startswith("init=glob(") for override in asked_overrides(config)):
        for name, missing in leave_out_unsupplied().items():
            reason = f"it needs {', '.join(missing)}, which this sweep does not supply"
            say(f"  init={name} is skipped: {reason}")


def planned_jobs(config: DictConfig) -> list[list[str]] | None:
    """The overrides of each job; None if the sweeper chooses them by results."""
    if not decided_ahead(config):
        return None
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        overrides = parser.parse_overrides(asked_overrides(config))
        batches = BasicSweeper.split_arguments(overrides, None)
    except HydraException:
        return None  # the sweeper itself reports what is wrong
    return [list(job) for batch in batches for job in batch]
