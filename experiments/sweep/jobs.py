"""What a sweep's folder holds of its jobs: `sweep.json`, and a file of each job that was begun.

Files are read here by the sweep itself and by others that only look. What is damaged is skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.console import say
from experiments.run.files import read_object, remove

UNKNOWN = {"heading": None, "total": None, "planned": None}


def sweep_facts(folder: Path) -> dict[str, Any]:
    """What `sweep.json` holds; where it is damaged, what is known without it."""
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


def read_jobs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Each job's file and what it holds."""
    found = ((path, read_job(path)) for path in job_paths(folder))
    return [(path, job) for path, job in found if isinstance(job, dict)]


def remove_damaged(folder: Path) -> None:
    """Remove job files that cannot be read: a job writes its file again when it ends."""
    for path in job_paths(folder):
        if isinstance(reason := read_job(path), str):
            say(f"  {path} is damaged ({reason}) and removed", style="yellow")
            remove(path)


def job_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("jobs/*.json"))


def read_job(path: Path) -> dict[str, Any] | str | None:
    """What a job's file holds, the reason why it is damaged, or None where it is gone."""
    try:
        job = read_object(path)
    except FileNotFoundError:  # another process has begun the list again
        return None
    except (OSError, ValueError) as error:
        return str(error)
    if type(job.get("job")) is not int or not are_names(job.get("overrides")):
        return "job must be a number, and overrides a list of names"
    place = (job.get("folder"), job.get("run_id"))
    if place != (None, None) and not are_names(list(place)):
        return "folder and run_id must be two names, or both null"
    return {**job, "folder": place[0], "run_id": place[1], "status": str(job.get("status"))}


def are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
