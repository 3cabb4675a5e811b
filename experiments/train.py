"""Train one run, or many.

    python -m experiments.train init=pissa seed=1
    python -m experiments.train -m 'init=glob(*)' seed=0,1
    python -m experiments.train --config-name sweep_compare

Every setting is listed by `python -m experiments.train --cfg job`.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.config import register_schemas, resolve
from experiments.console import say
from experiments.errors import ConfigurationError, RunFailed
from experiments.execution import execute
from experiments.sweep import position

CONFIGURATIONS = Path(__file__).resolve().parent.parent / "conf"

register_schemas()


@hydra.main(config_path=str(CONFIGURATIONS), config_name="train", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Hydra's entry point: convert the configuration once, run it, and report failures briefly."""
    many = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        run = resolve(composed)
        say(" ".join(filter(None, ["run", position(), run.init.name, "seed", str(run.seed)])))
        execute(run)
    except (ConfigurationError, RunFailed) as error:
        if many:
            say(f"  failed: {error}", style="red")  # the other runs go on
        # Hydra prints this kind of exception as its message; HYDRA_FULL_ERROR=1 shows the rest.
        raise CompactHydraException(str(error)) from error


if __name__ == "__main__":
    main()
