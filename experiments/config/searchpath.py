"""`init=glob(*)` sees the YAML of third parties too.

Hydra 1.3 applies `hydra.searchpath` when it composes a configuration, but not when a sweep expands
`glob(*)`: that reads the repository of configurations as it was before. This callback runs before
the sweeper and adds the same folders to that repository.
"""

from __future__ import annotations

import copy
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SearchPathForGlob(Callback):
    """Configured as `hydra.callbacks.searchpath`, ahead of what counts the jobs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        loader = GlobalHydra.instance().config_loader()
        path = copy.deepcopy(loader.config_search_path)
        schemas = path.get_path().pop()  # the ConfigStore comes last, as Hydra expects
        for folder in config.hydra.searchpath or []:
            path.append(provider="hydra.searchpath", path=folder)
        path.get_path().append(schemas)
        loader.repository.initialize_sources(path)
