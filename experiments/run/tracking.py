"""A mirror of a run in wandb, offline unless asked otherwise.

The local files are the truth. An error of the tracker is one warning: the run continues without
it, and its result is the same.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.records import TrackingConfig
from ..console import say

Log = Callable[[dict[str, Any]], None]
LONGEST_NAME, LONGEST_JOB_TYPE = 128, 64
"""Characters that wandb's server allows, also for an offline run that is synced later."""
TIMEOUTS = {"init_timeout": 60.0, "finish_timeout": 600.0}
"""Seconds. Older versions of wandb have fewer timeouts."""


class Mirror:
    """The run in wandb. The first error of wandb ends the mirror with one warning."""

    def __init__(self) -> None:
        self.run: Any = None

    def open(self, settings: TrackingConfig, folder: Path, **facts: Any) -> None:
        with self.guarded("init"):
            import wandb

            known = getattr(wandb.Settings, "model_fields", ())
            timeouts = {name: limit for name, limit in TIMEOUTS.items() if name in known}
            folder.mkdir(parents=True, exist_ok=True)
            self.run = wandb.init(
                project=settings.project,
                mode=settings.mode,
                dir=str(folder),
                settings=wandb.Settings(silent=True, console="off", **timeouts),
                **facts,
            )

    def log(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            with self.guarded("log"):
                self.run.log(*mirror(row))

    def close(self, exit_code: int) -> None:
        """Close the run, also after an error: an open one would get the next run's rows."""
        run, self.run = self.run, None
        if run is not None:
            with self.guarded("finish"):
                run.finish(exit_code=exit_code)

    @contextlib.contextmanager
    def guarded(self, call: str) -> Iterator[None]:
        """Turn an error of wandb into one warning, and restore the random generators."""
        state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        try:
            yield
        except (Exception, SystemExit) as error:
            fix = "; `pip install wandb`" if isinstance(error, ImportError) else ""
            message = " ".join(str(error).split())
            say(
                f"  tracking=wandb: {call} failed ({type(error).__name__}: {message}){fix}. The "
                "run continues without it; its own files are complete",
                style="yellow",
            )
            if call == "log":
                self.close_quietly()
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])  # noqa: NPY002
            torch.set_rng_state(state[2])

    def close_quietly(self) -> None:
        run, self.run = self.run, None
        with contextlib.suppress(Exception, SystemExit):
            run.finish(exit_code=1)


@contextlib.contextmanager
def track(
    settings: TrackingConfig,
    *,
    run_id: str,
    name: str,
    group: str,
    job_type: str,
    config: dict[str, Any],
    folder: Path,
) -> Iterator[Log]:
    """Open the tracker, yield its log function, and close it in every case.

    Hydra's basic launcher runs all jobs of a sweep in one process: a wandb run left open would get
    the metrics of the next.
    """
    if settings.backend == "none":
        yield lambda row: None
        return
    tracker = Mirror()
    tracker.open(
        settings,
        folder,
        group=shortened(group, LONGEST_NAME),
        job_type=shortened(job_type, LONGEST_JOB_TYPE),
        name=shortened(name, LONGEST_NAME),
        config=copy.deepcopy({"run_id": run_id, **config}),
    )
    failed = True
    try:
        yield tracker.log
        failed = False
    finally:
        tracker.close(exit_code=1 if failed else 0)


def shortened(name: str, most: int) -> str:
    """The name; a longer one than `most` is cut and gets a hash of the whole."""
    if len(name) <= most:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: most - len(mark) - 1]}-{mark}"


def mirror(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A row of metrics.jsonl in wandb's form: `split/metric`, and the step."""
    rest = {key: value for key, value in row.items() if key not in ("step", "split")}
    return {f"{row['split']}/{key}": value for key, value in rest.items()}, row["step"]
