"""The state of a run, from its files and its lock."""

from __future__ import annotations

from .folder import RunFolder
from .lock import is_held

STATES = ("finished", "running", "failed", "died", "missing")


def state_of(folder: RunFolder) -> str:
    """One of `STATES`. "died": the run started, has no result, and is not being worked on."""
    if folder.result_file.exists() and folder.finished() is not None:
        return "finished"
    if is_held(folder):
        return "running"
    if folder.failed_file.exists():
        return "failed"
    return "died" if folder.path.exists() else "missing"
