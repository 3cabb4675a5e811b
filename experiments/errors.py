"""The errors that a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial
from pathlib import Path


class ConfigurationError(ValueError):
    """A setting that cannot work. The message names it, its value, what it must be, and the fix."""


class RunFailed(RuntimeError):
    """A run that started and cannot continue, such as one whose loss is not finite.

    Attributes:
        reason: as in `failed.json`, such as "diverged"; `facts` are written there too.
    """

    def __init__(self, message: str, *, reason: str = "error", **facts: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.facts = facts

    def __reduce__(self) -> tuple:
        """Launchers pickle it to send it between processes."""
        return partial(type(self), reason=self.reason, **self.facts), self.args


class DamagedFile(RuntimeError):
    """A file in a run's folder that the run cannot continue from; it is replaced."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path} is damaged ({reason})")
        self.path = path


class RunElsewhere(RuntimeError):
    """Another process is working on this run."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as "did you mean 'text'? ", or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
