"""Train one run, or many.

    python -m experiments.train init=pissa seed=1
    python -m experiments.train -m 'init=glob(*)' seed=0,1
    python -m experiments.train --config-name sweep_compare

`python -m experiments.train --cfg job` lists every setting.
"""

from __future__ import annotations

import traceback

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from .config.location import CONFIGURATIONS
from .config.resolve import resolve
from .config.store import register_schemas
from .console import say
from .errors import ConfigurationError, RunElsewhere, RunFailed
from .run.execute import execute
from .run.failures import say_failure
from .sweep.manifest import position
from .sweep.plan import by_return_value, decided_ahead

register_schemas()


@hydra.main(config_path=str(CONFIGURATIONS), config_name="train", version_base="1.3")
def main(composed: DictConfig) -> float | None:
    """Execute one run, and return its validation score for sweepers that choose by it.

    A failed run of a sweep is recorded in its folder, and the sweep continues; its end names the
    run. A single run raises the error, and so does a run whose sweeper chooses by return values.
    """
    context = HydraConfig.get()
    many = context.mode == RunMode.MULTIRUN
    chooses = many and not decided_ahead(HydraConfig.instance().cfg)
    continues = many and not (chooses and by_return_value(HydraConfig.instance().cfg))
    try:
        run = resolve(composed)
        say(" ".join(filter(None, ["run", position(), run.init.name, "seed", str(run.seed)])))
        return execute(run, wait=chooses).get("validation_score")
    except RunElsewhere as error:
        if not continues:
            raise CompactHydraException(str(error)) from error
        say(f"  left to another process: {error}")
    except Exception as error:
        if continues:
            say_failure(error)
            traceback.clear_frames(error.__traceback__)  # they hold the failed run's model
        elif isinstance(error, ConfigurationError | RunFailed):
            # Hydra prints only the message of this kind; HYDRA_FULL_ERROR=1 shows the rest.
            raise CompactHydraException(str(error)) from error
        else:
            raise
    return None


if __name__ == "__main__":
    main()
