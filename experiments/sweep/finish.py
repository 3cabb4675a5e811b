"""The end of a sweep: runs that other processes worked on, and the names of failed runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.run_config import RunConfig
from ..console import say
from ..run.execute import execute
from ..run.failures import read_failure, say_failure
from ..run.folder import RunFolder
from ..run.lock import POLL, is_held
from ..run.state import state_of


def finish_sweep(jobs: list[dict[str, Any]], configured: Callable[[list[str]], RunConfig]) -> None:
    """Wait for runs of other processes, and take over those whose process died.

    Args:
        jobs: as in the manifest; a job that never started has only its overrides.
        configured: makes a run's configuration from a job's overrides.

    Raises:
        SystemExit: some runs have no result; the message names them, and the status is 1.
    """
    begun = [
        (RunFolder(job["run_id"], Path(job["folder"])), job) for job in jobs if job.get("folder")
    ]
    taken = [(folder, job) for folder, job in begun if state_of(folder) == "running"]
    if taken:
        say(f"waiting for {len(taken)} runs that other processes work on")
    for folder, job in taken:
        while is_held(folder):
            time.sleep(POLL)
        if state_of(folder) == "died":
            try:
                execute(configured(job["overrides"]), wait=True)
            except Exception as error:
                say_failure(error)
    unfinished = [
        f"{folder.path.name} ({(read_failure(folder) or {}).get('reason', 'died')})"
        for folder, _ in begun
        if state_of(folder) != "finished"
    ]
    unfinished += [" ".join(job["overrides"]) for job in jobs if not job.get("folder")]
    if unfinished:
        raise SystemExit(f"{len(unfinished)} of {len(jobs)} runs failed: {', '.join(unfinished)}")
