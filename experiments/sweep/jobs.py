"""The files in a sweep's folder: `sweep.json`, and one file for each job that has started.

Damaged files are skipped: another process may be writing, and a job writes its file again at its
end.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..config.names import sweep_path
from ..errors import ConfigurationError
from ..run.files import kind_of, read_object, remove, write_json
from ..run.outputs import open_outputs

LOCK = ".lock"
WRITTEN = (LOCK, "jobs", "multirun.yaml", "optimization_results.yaml")
"""What is written in place in a sweep's folder, by Hydra too; other files are replaced."""
UNKNOWN = {"heading": None, "total": None, "planned": None}


def open_sweep(outputs: str, sweep: str) -> Path:
    """The folder of a sweep, made and tested to be writable.

    Raises:
        ConfigurationError: its name is not that of one folder, it cannot be written, or a link
            leads from it out of `outputs`.
    """
    folder = sweep_path(outputs, sweep)
    open_outputs(Path(outputs), folder, *(folder / name for name in WRITTEN))
    lock = folder / LOCK
    if os.path.lexists(lock) and (kind := kind_of(lock)) != "a file":
        raise ConfigurationError(f"{lock} is {kind}, and a lock must be a file. Remove it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be made ({error}). Remove it.") from error
    return folder


def sweep_facts(folder: Path) -> dict[str, Any]:
    """The content of `sweep.json`, with null for what is damaged in it."""
    try:
        facts = read_object(folder / "sweep.json")
    except (OSError, ValueError):
        facts = {}
    facts = {"sweep": folder.name, **UNKNOWN, **facts}
    if not (isinstance(facts["planned"], list) and all(map(are_names, facts["planned"]))):
        facts["planned"] = None
    if type(facts["total"]) is not int:
        facts["total"] = None
    return facts


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The jobs of the sweep that have started, in the order of the plan."""
    planned = sweep_facts(folder)["planned"] or []
    places = {tuple(job): place for place, job in enumerate(planned)}
    found = (read_job(path) for path in sorted(folder.glob("jobs/*.json")))
    jobs = [job for job in found if job is not None]
    return sorted(jobs, key=lambda job: (places.get(tuple(job["overrides"]), 0), job["job"]))


def read_job(path: Path) -> dict[str, Any] | None:
    """The content of a job's file; None if it is missing or damaged."""
    try:
        job = read_object(path)
    except (OSError, ValueError):
        return None
    place = [job.get("folder"), job.get("run_id")]
    whole = type(job.get("job")) is int and are_names(job.get("overrides"))
    if not whole or not (place == [None, None] or are_names(place)):
        return None
    return {**job, "folder": place[0], "run_id": place[1], "status": str(job.get("status"))}


def write_job(folder: Path, job: dict[str, Any]) -> None:
    """Write a job's file, which is named after its overrides."""
    path = job_path(folder, job["overrides"])
    if os.path.lexists(path) and kind_of(path) != "a file":
        remove(path)
    write_json(path, job)


def job_path(folder: Path, overrides: list[str]) -> Path:
    name = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:16]
    return folder / "jobs" / f"{name}.json"


def are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
