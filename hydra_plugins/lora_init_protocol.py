"""The Hydra sweeper of the fair protocol."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProtocolSweeper(Sweeper):
    """Configured by `ProtocolConfig`, as `hydra/sweeper: protocol`.

    Hydra imports every plugin at the start of every Hydra application. The protocol itself is
    therefore imported only when it is used, from the application's package.
    """

    def __init__(self, application: str, **settings: Any) -> None:
        super().__init__()
        self.application, self.given = application, settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        search = import_module(f"{self.application}.sweep.protocol.search")
        search.search(self.given, arguments, self.config, self.hydra_context, self.launcher)
