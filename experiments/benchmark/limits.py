"""A time limit on a call in this process, by the kernel's alarm.

Python runs a signal's handler between two of its own instructions: a loop that never ends is
stopped, a single call into LAPACK ends first.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class OutOfTime(Exception):
    """A call took longer than it was allowed to."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the body after `seconds`. Only in a process's main thread."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"no end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
