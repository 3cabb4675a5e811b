"""Train one run, or many.

    python -m experiments.train init=pissa seed=1
    python -m experiments.train -m 'init=glob(*)' seed=0,1
    python -m experiments.train --config-name sweep_compare

Every setting is listed by `python -m experiments.train --cfg job`.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.config.schema import register_schemas, resolve
from experiments.console import say
from experiments.errors import ConfigurationError, RunElsewhere, RunFailed
from experiments.run.execute import execute
from experiments.sweep.finish import tell_failure
from experiments.sweep.manifest import by_return_value, decided_ahead, position

CONFIGURATIONS = Path(__file__).resolve().parent.parent / "conf"

register_schemas()


@hydra.main(config_path=str(CONFIGURATIONS), config_name="train", version_base="1.3")
def main(composed: DictConfig) -> float | None:
    """Hydra's entry point: one run. Returns its validation score, by which a sweeper may choose.

    A run of a list that goes wrong is marked in its folder, and the list goes on; the end of the
    sweep names it. A sweeper that chooses by what this returns gets the exception, and so does a
    run that was started alone.
    """
    context = HydraConfig.get()
    many = context.mode == RunMode.MULTIRUN
    chooses = many and not decided_ahead(HydraConfig.instance().cfg)
    goes_on = many and not (chooses and by_return_value(HydraConfig.instance().cfg))
    try:
        run = resolve(composed)
        say(" ".join(filter(None, ["run", position(), run.init.name, "seed", str(run.seed)])))
        return execute(run, wait=chooses).get("validation_score")
    except RunElsewhere as error:
        if not goes_on:
            raise CompactHydraException(str(error)) from error
        say(f"  left to another process: {error}")
    except Exception as error:
        if goes_on:
            tell_failure(error)
            traceback.clear_frames(error.__traceback__)  # which hold the failed run's model
        elif isinstance(error, ConfigurationError | RunFailed):
            # Hydra prints this kind as its message; HYDRA_FULL_ERROR=1 shows the rest.
            raise CompactHydraException(str(error)) from error
        else:
            raise
    return None


if __name__ == "__main__":
    main()
