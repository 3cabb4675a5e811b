"""The two failures that a user is meant to read: a wrong setting, and a run that went wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigurationError(ValueError):
    """A setting that cannot work. The message names it, its value, what is allowed, and the fix."""


class RunFailed(RuntimeError):
    """A run that started and cannot go on, such as one whose loss is no longer finite."""

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as "did you mean 'text'? ", or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
