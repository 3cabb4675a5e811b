"""Which runs belong to a sweep: a Hydra callback that keeps `outputs/sweeps/<name>/manifest.json`.

Each job writes its own file, in whichever process a launcher runs it. The manifest is collected
from these files after every job, so it is right even if the sweep is interrupted. A sweep starts
with an empty list, unless runs of a sweep of the same name are being worked on: then both share
one list.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..config.names import sweep_path
from ..config.resolve import run_of
from ..errors import ConfigurationError
from ..run.files import remove, write_json
from ..run.folder import RunFolder, identify
from ..run.state import state_of
from .finish import finish_sweep
from .jobs import LOCK, open_sweep, read_jobs, sweep_facts, write_job
from .plan import planned_jobs, skip_unsupplied


class Manifest(Callback):
    """Configured as `hydra.callbacks.manifest`.

    Args:
        heading: a sentence for the top of the report, such as what a sweep does not show.
    """

    def __init__(self, heading: str | None = None) -> None:
        self.heading = heading

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Start the list.

        Raises:
            SystemExit: the sweep's folder cannot be written, or is outside `paths.outputs`.
        """
        try:
            folder = open_sweep(config.paths.outputs, config.sweep)
            skip_unsupplied(config)
            self.begin(config, folder, planned_jobs(config))
        except ConfigurationError as error:
            raise SystemExit(str(error)) from error  # Hydra turns other errors into warnings

    def begin(self, config: DictConfig, folder: Path, planned: list[list[str]] | None) -> None:
        with FileLock(folder / LOCK):
            if not any(map(at_work, read_jobs(folder))):
                remove(folder / "jobs")
            elif planned is not None:
                known = sweep_facts(folder)["planned"] or []
                planned = known + [job for job in planned if job not in known]
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
        """Return to runs that other processes worked on, and name those that failed.

        Raises:
            SystemExit: a run is not finished.
        """
        folder = sweep_path(config.paths.outputs, config.sweep)
        try:
            planned = planned_jobs(config)
            if planned is not None:
                begun = {tuple(job["overrides"]): job for job in read_jobs(folder)}
                loader = GlobalHydra.instance().config_loader()
                finish_sweep(
                    [begun.get(tuple(job), {"overrides": job}) for job in planned],
                    lambda overrides: run_of(loader.load_sweep_config(config, overrides)),
                )
        finally:
            with contextlib.suppress(OSError):  # a full disk must not hide the exit status
                refresh(folder)


def note(config: DictConfig, *, ended: bool) -> None:
    """Write this job's file, then the manifest."""
    if config.hydra.mode != RunMode.MULTIRUN:
        return
    try:
        run = identify(run_of(config))
    except ConfigurationError:
        run = None  # the job itself reports what is wrong
    job = {
        "job": config.hydra.job.num,
        "folder": run and str(run.path),
        "run_id": run and run.id,
        "overrides": OmegaConf.to_container(config.hydra.overrides.task),
        "status": status_of(run, ended),
    }
    folder = sweep_path(config.paths.outputs, config.sweep)
    write_job(folder, job)
    gather(folder)


def folder_of(job: dict[str, Any]) -> RunFolder | None:
    """The run of a job; None if the job's configuration was wrong."""
    return RunFolder(job["run_id"], Path(job["folder"])) if job["folder"] else None


def at_work(job: dict[str, Any]) -> bool:
    """Whether a process works on the job's run at this moment."""
    run = folder_of(job)
    return run is not None and state_of(run) == "running"


def status_of(run: RunFolder | None, ended: bool) -> str:
    """started, finished or failed, by the run's files: two sweeps may have the same job."""
    state = "missing" if run is None else state_of(run)
    if state in ("finished", "running"):
        return "finished" if state == "finished" else "started"
    return "failed" if ended else "started"


def refresh(folder: Path) -> None:
    """Update the status of jobs that have started, and collect the manifest."""
    for job in read_jobs(folder):
        if job["status"] == "started" and job["folder"] is not None:
            write_job(folder, {**job, "status": status_of(folder_of(job), ended=True)})
    gather(folder)


def complete(folder: Path) -> None:
    """Set the total of a sweep whose sweeper chose its jobs by results."""
    with FileLock(folder / LOCK):
        facts = sweep_facts(folder)
        facts["total"] = len(distinct(read_jobs(folder)))
        write_json(folder / "sweep.json", facts)
    gather(folder)


def distinct(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One job per run, the last: a protocol asks for a run again to test it."""
    return list({job["run_id"] or job["job"]: job for job in jobs}.values())


def gather(folder: Path) -> None:
    """Write the manifest from the jobs' files, under a lock: parallel jobs write it too."""
    with FileLock(folder / LOCK):
        facts = sweep_facts(folder)
        del facts["planned"]
        runs = distinct(read_jobs(folder))
        finished = sum(run["status"] == "finished" for run in runs)
        status = "finished" if finished and finished == facts["total"] else "incomplete"
        write_json(folder / "manifest.json", {**facts, "status": status, "runs": runs})


def position() -> str:
    """ "3/16" in a multirun, an empty string outside one."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return ""
    number = hydra.job.num + 1
    total = sweep_facts(Path(hydra.sweep.dir))["total"]
    return f"{number}/{total}" if total else str(number)
