"""Which runs belong to a sweep: a Hydra callback that keeps `outputs/sweeps/<name>/manifest.json`.

Folders of earlier sweeps lie beside those of this one, and finished runs are skipped, so that the
folders themselves cannot tell. The manifest begins empty with each multirun. Each job writes a file
of its own, in whichever process a launcher runs it, and the manifest is gathered anew from these
after every job: it is right even when a sweep is broken off.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.composition import run_of
from experiments.errors import ConfigurationError
from experiments.runs import identify, write_json


class Manifest(Callback):
    """Configured as `hydra.callbacks.manifest`.

    Args:
        heading: a sentence for the top of the report, such as what a sweep does not show.
    """

    def __init__(self, heading: str | None = None) -> None:
        self.heading = heading

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = sweep_folder(config)
        shutil.rmtree(folder / "jobs", ignore_errors=True)
        facts = {"sweep": config.sweep, "heading": self.heading, "total": count_jobs(config)}
        write_json(folder / "sweep.json", facts)
        gather(folder)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.note(config, "started")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        finished = job_return.status == JobStatus.COMPLETED
        self.note(config, "finished" if finished else "failed")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        gather(sweep_folder(config))

    def note(self, config: DictConfig, status: str) -> None:
        """Write this job's file, then the manifest."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        try:
            run = identify(run_of(config))
        except ConfigurationError:
            run = None  # the job itself reports what is wrong
        entry = {
            "job": config.hydra.job.num,
            "folder": run and str(run.path),
            "run_id": run and run.id,
            "overrides": OmegaConf.to_container(config.hydra.overrides.task),
            "status": status,
        }
        folder = sweep_folder(config)
        write_json(folder / "jobs" / f"{config.hydra.job.num:05d}.json", entry)
        gather(folder)


def sweep_folder(config: DictConfig) -> Path:
    return Path(config.paths.outputs) / "sweeps" / config.sweep


def gather(folder: Path) -> None:
    """Write the manifest from the files of the jobs. The lock keeps parallel jobs from writing a
    list that another one has already extended."""
    with FileLock(folder / ".lock"):
        facts = json.loads((folder / "sweep.json").read_text())
        jobs = [json.loads(path.read_text()) for path in sorted(folder.glob("jobs/*.json"))]
        # A protocol asks for a run again to have it tested: one run, as it was left last.
        runs = list({job["run_id"] or job["job"]: job for job in jobs}.values())
        finished = sum(run["status"] == "finished" for run in runs)
        status = "finished" if finished and finished == facts["total"] else "incomplete"
        write_json(folder / "manifest.json", {**facts, "status": status, "runs": runs})


def count_jobs(config: DictConfig) -> int | None:
    """How many jobs the overrides and `hydra.sweeper.params` ask for; None where a sweeper of
    another kind decides as it goes."""
    if not str(config.hydra.sweeper._target_).endswith("BasicSweeper"):
        return None
    parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        overrides = parser.parse_overrides(parameters + list(config.hydra.overrides.task))
        batches = BasicSweeper.split_arguments(overrides, None)
    except HydraException:
        return None  # the sweeper will say what is wrong
    return sum(map(len, batches))


def position() -> str:
    """ "3/16" in a multirun, an empty string outside one."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return ""
    number = hydra.job.num + 1
    try:
        facts = json.loads((Path(hydra.sweep.dir) / "sweep.json").read_text())
    except (OSError, ValueError):
        return str(number)
    return f"{number}/{facts['total']}" if facts["total"] else str(number)
