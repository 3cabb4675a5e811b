"""The protocol on the jobs of a Hydra launcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from joblib import effective_n_jobs
from omegaconf import DictConfig, OmegaConf

from ...config.protocol import ProtocolConfig
from ...config.resolve import run_of
from ...errors import ConfigurationError
from ...run.folder import RunFolder, identify
from ..manifest import complete
from .record import Record
from .stages import Stages, refuse_incomplete
from .trials import refuse_owned


class LauncherJobs:
    """Composes trials, and launches them; `arguments` are the overrides of the command line."""

    def __init__(
        self, arguments: list[str], config: DictConfig, context: HydraContext, launcher: Launcher
    ) -> None:
        self.fixed, self.config, self.launcher = arguments, config, launcher
        self.loader = context.config_loader
        self.launched = 0
        self.folders: dict[tuple[str, ...], RunFolder] = {}

    @property
    def workers(self) -> int:
        """How many jobs the launcher runs at once, if its settings say so."""
        return effective_n_jobs(self.config.hydra.launcher.get("n_jobs", 1))

    def folder(self, overrides: Sequence[str]) -> RunFolder:
        key = tuple(overrides)
        if key not in self.folders:
            composed = self.loader.load_sweep_config(self.config, [*self.fixed, *overrides])
            self.folders[key] = identify(run_of(composed))
        return self.folders[key]

    def launch(self, batch: Sequence[Sequence[str]]) -> None:
        jobs = [[*self.fixed, *overrides] for overrides in batch]
        self.launcher.launch(jobs, initial_job_idx=self.launched)
        self.launched += len(jobs)


def search(
    given: dict[str, Any],
    arguments: list[str],
    config: DictConfig,
    context: HydraContext,
    launcher: Launcher,
) -> None:
    """Run the protocol.

    Args:
        given: the settings, as in `ProtocolConfig`.
        arguments: overrides for every run.

    Raises:
        CompactHydraException: a setting cannot work, or runs are missing at the end.
    """
    folder = Path(config.hydra.sweep.dir)
    settings = OmegaConf.to_container(OmegaConf.create(given))
    assert isinstance(settings, dict)
    try:
        for key in settings.keys() - {field.name for field in fields(ProtocolConfig)}:
            raise ConfigurationError(f"hydra.sweeper.{key} is not a setting. Leave it out.")
        protocol = ProtocolConfig(**settings)
        protocol.check()
        parser = OverridesParser.create(config_loader=context.config_loader)
        parsed = parser.parse_overrides(arguments)
        for override in parsed:
            if override.is_sweep_override():
                raise ConfigurationError(
                    f"{override.input_line}: the protocol itself sweeps. Give one value."
                )
        refuse_owned([override.get_key_element().lstrip("+~") for override in parsed], protocol)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "multirun.yaml")
        jobs = LauncherJobs(arguments, config, context, launcher)
        record = Record(folder / "protocol.json", protocol)
        refuse_incomplete(Stages(protocol, jobs, record).run())
        if not protocol.dry_run:
            complete(folder)
    except ConfigurationError as error:
        raise CompactHydraException(str(error)) from error
