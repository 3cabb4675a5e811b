"""Following a run elsewhere than in its folder: wandb, offline unless asked otherwise.

The local files are the truth; a tracker only mirrors them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import ConfigurationError

Log = Callable[[dict[str, Any]], None]
MODES = ("offline", "online", "disabled")


@dataclass
class TrackingConfig:
    """Where a run is mirrored to.

    Attributes:
        backend: none or wandb.
        project, mode: wandb's; offline runs are uploaded later with `wandb sync`.
    """

    backend: str = "none"
    project: str = "lora_init"
    mode: str = "offline"

    def __post_init__(self) -> None:
        if self.backend not in ("none", "wandb"):
            raise ValueError(f"tracking.backend={self.backend!r}; allowed are none and wandb")
        if self.mode not in MODES:
            raise ValueError(f"tracking.mode={self.mode!r}; allowed are {', '.join(MODES)}")


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
    """Open the tracker, yield its log function, and close it whatever happens.

    Hydra's basic launcher runs all jobs of a sweep in one process: a wandb run left open would
    swallow the metrics of the next.
    """
    if settings.backend == "none":
        yield lambda row: None
        return
    try:
        import wandb
    except ImportError as error:
        raise ConfigurationError(
            "tracking=wandb: the package wandb is not installed; `pip install wandb`, or use "
            "tracking=none"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=settings.project,
        mode=settings.mode,
        group=group,
        job_type=job_type,
        name=name,
        config={"run_id": run_id, **config},
        dir=str(folder),
        settings=wandb.Settings(silent=True, console="off"),
    )
    failed = True
    try:
        yield lambda row: run.log(*mirror(row))
        failed = False
    finally:
        run.finish(exit_code=1 if failed else 0)


def mirror(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A line of metrics.jsonl as wandb wants it: `split/metric`, and the step beside it."""
    rest = {key: value for key, value in row.items() if key not in ("step", "split")}
    return {f"{row['split']}/{key}": value for key, value in rest.items()}, row["step"]
