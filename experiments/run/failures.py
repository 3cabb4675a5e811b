"""Why a run ended without a result: one word for it, and `failed.json`."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from ..console import say
from ..errors import ConfigurationError, RunFailed
from .files import read_object, write_json
from .folder import RunFolder

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SPACE_TEXTS = tuple(f"(os error {number})" for number in NO_SPACE)
NO_MEMORY_TEXTS = ("can't allocate memory", "not enough memory")
LINES_KEPT = 20


def reason_of(error: BaseException) -> str:
    """diverged, time limit, out of memory, disk full, configuration or error.

    Libraries wrap errors, so the chain of causes is searched too. safetensors and torch's CPU
    allocator give the reason only in their messages.
    """
    for link in chain(error):
        if isinstance(link, RunFailed):
            return link.reason
        if isinstance(link, MemoryError | torch.OutOfMemoryError):
            return "out of memory"
        if isinstance(link, OSError) and link.errno in NO_SPACE:
            return "disk full"
        text = str(link)
        if any(sign in text for sign in NO_SPACE_TEXTS):
            return "disk full"
        if isinstance(link, RuntimeError) and any(sign in text for sign in NO_MEMORY_TEXTS):
            return "out of memory"
    return "configuration" if isinstance(error, ConfigurationError) else "error"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def say_failure(error: Exception) -> None:
    """Print one line about a failed run of a sweep that continues without it."""
    reason = reason_of(error)
    kind = f"{type(error).__name__}: " if reason == "error" else ""
    say(f"  failed ({reason}): {kind}{str(error) or type(error).__name__}", style="red")


def record_failure(folder: RunFolder, error: Exception) -> None:
    """Write `failed.json`, unless a setting was wrong and the run has no folder yet."""
    reason = reason_of(error)
    if reason == "configuration" and not folder.path.exists():
        return
    failure = {
        "run_id": folder.id,
        "reason": reason,
        "error": type(error).__name__,
        "message": str(error),
        **getattr(error, "facts", {}),
    }
    if reason not in ("configuration", "diverged", "time limit"):
        lines = "".join(traceback.format_exception(error)).splitlines()
        failure["traceback"] = lines[-LINES_KEPT:]
    if reason == "diverged":
        folder.forget_checkpoint()
    try:
        folder.remove_scratch()
        write_json(folder.failed_file, failure)
    except (OSError, ConfigurationError) as second:
        say(f"  cannot write {folder.failed_file}: {second}", style="red")


def read_failure(folder: RunFolder) -> dict[str, Any] | None:
    """The content of `failed.json`, if it belongs to this run."""
    try:
        failure = read_object(folder.failed_file)
    except (OSError, ValueError):
        return None
    known = failure.get("run_id") == folder.id and isinstance(failure.get("reason"), str)
    return failure if known else None


def refuse_to_diverge_again(folder: RunFolder) -> None:
    """Refuse a run that has diverged before: it would diverge at the same step.

    Raises:
        RunFailed: it diverged before.
    """
    failure = read_failure(folder)
    if failure is not None and failure["reason"] == "diverged":
        again = "this happened before and is not repeated (runtime.rerun=true repeats it)"
        raise RunFailed(f"{failure.get('message')}; {again}", reason="diverged")
