"""The end of a sweep: back to the runs that others had taken, and a word on those that failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.config.schema import RunConfig
from experiments.console import say
from experiments.run.execute import execute
from experiments.run.failures import read_failure, reason_of
from experiments.run.folder import RunFolder
from experiments.run.lock import wait_until_free
from experiments.run.state import state_of


def finish_sweep(jobs: list[dict[str, Any]], configured: Callable[[list[str]], RunConfig]) -> None:
    """Wait for runs that are still under way elsewhere, and take over those that died meanwhile.

    Args:
        jobs: as in the manifest; one that was never begun has overrides alone.
        configured: makes a run's configuration from a job's overrides.

    Raises:
        SystemExit: some runs have no result; its line names them, and its status is 1.
    """
    begun = [
        (RunFolder(job["run_id"], Path(job["folder"])), job) for job in jobs if job.get("folder")
    ]
    taken = [(folder, job) for folder, job in begun if state_of(folder) == "running"]
    if taken:
        say(f"waiting for {len(taken)} runs that other processes work on")
    for folder, job in taken:
        wait_until_free(folder)
        if state_of(folder) == "died":
            try:
                execute(configured(job["overrides"]), wait=True)
            except Exception as error:
                tell_failure(error)
    unfinished = [
        f"{folder.path.name} ({(read_failure(folder) or {}).get('reason', 'died')})"
        for folder, _ in begun
        if state_of(folder) != "finished"
    ]
    unfinished += [" ".join(job["overrides"]) for job in jobs if not job.get("folder")]
    if unfinished:
        raise SystemExit(f"{len(unfinished)} of {len(jobs)} runs failed: {', '.join(unfinished)}")


def tell_failure(error: Exception) -> None:
    """One line on a run of a sweep that goes on without it."""
    told = str(error) or type(error).__name__
    reason = reason_of(error)
    kind = "" if reason != "error" else f"{type(error).__name__}: "
    say(f"  failed ({reason}): {kind}{told}", style="red")
