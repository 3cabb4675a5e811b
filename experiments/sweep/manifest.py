"""Which runs belong to a sweep: a Hydra callback that keeps `outputs/sweeps/<name>/manifest.json`.

Folders of earlier sweeps lie beside those of this one, and finished runs are skipped, so that the
folders themselves cannot tell. Each job writes a file of its own, named after its overrides, in
whichever process a launcher runs it, and the manifest is gathered anew from these after every job:
it is right even when a sweep is broken off. A sweep begins with an empty list, unless another of
the same name is at work at that moment: then both share one list.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.config.composition import run_of
from experiments.config.names import sweep_path
from experiments.errors import ConfigurationError
from experiments.run.files import remove
from experiments.run.folder import RunFolder, identify, write_json
from experiments.run.lock import open_regular, try_lock
from experiments.run.outputs import open_sweep
from experiments.run.state import state_of
from experiments.sweep.finish import finish_sweep
from experiments.sweep.jobs import read_jobs, remove_damaged, sweep_facts


class Manifest(Callback):
    """Configured as `hydra.callbacks.manifest`.

    Args:
        heading: a sentence for the top of the report, such as what a sweep does not show.
    """

    def __init__(self, heading: str | None = None) -> None:
        self.heading = heading
        self.presence: int | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin the list.

        Raises:
            SystemExit: the sweep's folder cannot be written, or would lie outside `paths.outputs`.
        """
        try:
            self.begin(config, open_sweep(config.paths.outputs, config.sweep))
        except ConfigurationError as error:
            raise SystemExit(str(error)) from error  # Hydra turns other errors into warnings

    def begin(self, config: DictConfig, folder: Path) -> None:
        planned = planned_jobs(config)
        with FileLock(folder / ".lock"):
            # Held, shared, as long as this process lives: who can have it alone is alone.
            self.presence = open_regular(folder / ".at_work", os.O_RDWR | os.O_CREAT)
            if try_lock(self.presence):
                remove(folder / "jobs")
            elif planned is not None:
                known = sweep_facts(folder)["planned"] or []
                planned = known + [job for job in planned if job not in known]
            fcntl.flock(self.presence, fcntl.LOCK_SH)
            facts = {
                "sweep": config.sweep,
                "heading": self.heading,
                "total": None if planned is None else len(planned),
                "planned": planned,
            }
            write_json(folder / "sweep.json", facts)
        gather(folder)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        note(config, ended=False)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        note(config, ended=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Come back to runs that other processes had taken; name those that failed.

        Raises:
            SystemExit: a run is not finished.
        """
        folder = sweep_folder(config)
        try:
            planned = planned_jobs(config)
            if planned is not None:
                begun = {tuple(job["overrides"]): job for job in listed(folder, planned)}
                finish_sweep(
                    [begun.get(tuple(job), {"overrides": job}) for job in planned],
                    lambda overrides: run_of(reload(config, overrides)),
                )
        finally:
            # On a full disk neither the list nor the presence was written, and the exit status is
            # what matters.
            with contextlib.suppress(OSError):
                refresh(folder)
            if self.presence is not None:
                os.close(self.presence)


def note(config: DictConfig, *, ended: bool) -> None:
    """Write this job's file, then the manifest."""
    if config.hydra.mode != RunMode.MULTIRUN:
        return
    try:
        run = identify(run_of(config))
    except ConfigurationError:
        run = None  # the job itself reports what is wrong
    overrides = OmegaConf.to_container(config.hydra.overrides.task)
    entry = {
        "job": config.hydra.job.num,
        "folder": run and str(run.path),
        "run_id": run and run.id,
        "overrides": overrides,
        "status": status_of(run, ended),
    }
    folder = sweep_folder(config)
    name = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:16]
    write_json(folder / "jobs" / f"{name}.json", entry)
    gather(folder)


def status_of(run: RunFolder | None, ended: bool) -> str:
    """started, finished or failed, by the run's files: two sweeps may have the same job."""
    state = "missing" if run is None else state_of(run)
    if state in ("finished", "running"):
        return "finished" if state == "finished" else "started"
    return "failed" if ended else "started"


def reload(config: DictConfig, overrides: list[str]) -> DictConfig:
    """A job's configuration, as its launcher made it."""
    return GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)


def sweep_folder(config: DictConfig) -> Path:
    """The folder of the sweep.

    Raises:
        ConfigurationError: its name is not that of one folder below `paths.outputs`.
    """
    return sweep_path(config.paths.outputs, config.sweep)


def listed(folder: Path, planned: list[list[str]] | None) -> list[dict[str, Any]]:
    """The jobs' files in the order of the plan, or as they were numbered where there is none."""
    places = {tuple(job): place for place, job in enumerate(planned or [])}
    jobs = [job for _, job in read_jobs(folder)]
    return sorted(jobs, key=lambda job: (places.get(tuple(job["overrides"]), 0), job["job"]))


def refresh(folder: Path) -> None:
    """Look again at what has become of jobs that were started, and gather."""
    for path, job in read_jobs(folder):
        if job["status"] == "started" and job["folder"] is not None:
            run = RunFolder(job["run_id"], Path(job["folder"]))
            write_json(path, {**job, "status": status_of(run, ended=True)})
    gather(folder)


def complete(folder: Path) -> None:
    """A sweeper that decided as it went has come to its end: what was begun is all there is."""
    with FileLock(folder / ".lock"):
        facts = sweep_facts(folder)
        facts["total"] = len(distinct(listed(folder, None)))
        write_json(folder / "sweep.json", facts)
    gather(folder)


def distinct(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a run, as it was left last: a protocol asks for a run again to have it tested."""
    return list({job["run_id"] or job["job"]: job for job in jobs}.values())


def gather(folder: Path) -> None:
    """Write the manifest from the files of the jobs. The lock keeps parallel jobs from writing a
    list that another one has already extended."""
    with FileLock(folder / ".lock"):
        remove_damaged(folder)
        facts = sweep_facts(folder)
        runs = distinct(listed(folder, facts.pop("planned")))
        finished = sum(run["status"] == "finished" for run in runs)
        status = "finished" if finished and finished == facts["total"] else "incomplete"
        write_json(folder / "manifest.json", {**facts, "status": status, "runs": runs})


def decided_ahead(config: DictConfig) -> bool:
    """Whether all jobs are known before the first. Other sweepers choose by results as they go."""
    return str(config.hydra.sweeper._target_).endswith("BasicSweeper")


def by_return_value(config: DictConfig) -> bool:
    """Whether the sweeper learns of results from what a job returns; ours reads runs' folders."""
    return not str(config.hydra.sweeper._target_).startswith("hydra_plugins.lora_init")


def planned_jobs(config: DictConfig) -> list[list[str]] | None:
    """The overrides of each job that the command line and `hydra.sweeper.params` ask for; None
    where a sweeper of another kind decides as it goes."""
    if not decided_ahead(config):
        return None
    parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        overrides = parser.parse_overrides(parameters + list(config.hydra.overrides.task))
        batches = BasicSweeper.split_arguments(overrides, None)
    except HydraException:
        return None  # the sweeper will say what is wrong
    return [list(job) for batch in batches for job in batch]


def position() -> str:
    """ "3/16" in a multirun, an empty string outside one."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return ""
    number = hydra.job.num + 1
    facts = sweep_facts(Path(hydra.sweep.dir))
    return f"{number}/{facts['total']}" if facts["total"] else str(number)
