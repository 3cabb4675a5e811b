"""The Hydra sweeper of the fair protocol: it composes and launches the trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class ProtocolSweeper(Sweeper):
    """Configured by `ProtocolConfig`, as `hydra/sweeper: protocol`.

    It imports `experiments` only when it is used: Hydra imports every plugin at the start of every
    Hydra application.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.given = settings
        self.launched = 0
        self.fixed: list[str] = []
        self.folders: dict[tuple[str, ...], Any] = {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    @property
    def workers(self) -> int:
        """How many jobs the launcher runs at once, if its settings say so."""
        from joblib import effective_n_jobs

        return effective_n_jobs(self.config.hydra.launcher.get("n_jobs", 1))

    def sweep(self, arguments: list[str]) -> None:
        from experiments.config.protocol import ProtocolConfig
        from experiments.errors import ConfigurationError
        from experiments.sweep.manifest import complete
        from experiments.sweep.protocol.record import Record
        from experiments.sweep.protocol.stages import Stages, refuse_incomplete
        from experiments.sweep.protocol.trials import refuse_owned

        folder = Path(self.config.hydra.sweep.dir)
        settings = OmegaConf.to_container(OmegaConf.create(self.given))
        try:
            for key in settings.keys() - {field.name for field in fields(ProtocolConfig)}:
                raise ConfigurationError(f"hydra.sweeper.{key} is not a setting. Leave it out.")
            settings = ProtocolConfig(**settings)
            settings.check()
            parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
            parsed = parser.parse_overrides(arguments)
            for override in parsed:
                if override.is_sweep_override():
                    raise ConfigurationError(
                        f"{override.input_line}: the protocol itself sweeps. Give one value."
                    )
            refuse_owned([override.get_key_element().lstrip("+~") for override in parsed], settings)
            self.fixed = arguments
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.config, folder / "multirun.yaml")
            record = Record(folder / "protocol.json", settings)
            refuse_incomplete(Stages(settings, self, record).run())
            if not settings.dry_run:
                complete(folder)
        except ConfigurationError as error:
            raise CompactHydraException(str(error)) from error

    def folder(self, overrides: Sequence[str]) -> Any:
        from experiments.config.resolve import run_of
        from experiments.run.folder import identify

        key = tuple(overrides)
        if key not in self.folders:
            loader = self.hydra_context.config_loader
            composed = loader.load_sweep_config(self.config, [*self.fixed, *overrides])
            self.folders[key] = identify(run_of(composed))
        return self.folders[key]

    def launch(self, batch: Sequence[Sequence[str]]) -> None:
        jobs = [[*self.fixed, *overrides] for overrides in batch]
        self.launcher.launch(jobs, initial_job_idx=self.launched)
        self.launched += len(jobs)
