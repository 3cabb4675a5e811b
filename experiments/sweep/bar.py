"""A bar over a sweep whose runs work in other processes: a Hydra callback.

A launcher such as joblib starts workers and waits. The workers show no bars, since they share one
terminal; this bar reads their progress from their folders.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ..config.names import sweep_path
from ..console import sweep_bar
from .status.survey import Survey, survey

INTERVAL = 1.0
SHARE = 0.02
"""The largest share of the time for reading folders; a sweep may have thousands of them."""


class SweepBar(Callback):
    """Configured as `hydra.callbacks.bar`, after the manifest, whose files it reads."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type[SweepBar], tuple[()]]:
        """Hydra pickles every callback with each job; a copy there has no thread."""
        return SweepBar, ()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not leaves_a_line(config.hydra.launcher):
            return
        folder = sweep_path(config.paths.outputs, config.sweep)
        self.thread = threading.Thread(target=follow, args=(folder, self.ended), daemon=True)
        self.thread.start()
        atexit.register(self.end)  # so that the terminal always gets its cursor back
        self.end_when_interrupted()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.end()

    def end_when_interrupted(self) -> None:
        """Remove the bar before Ctrl-C is handled, so that it is not between printed lines."""
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(before):
            return

        def handle(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, before)
            self.end()
            before(number, frame)

        signal.signal(signal.SIGINT, handle)

    def end(self) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()


def leaves_a_line(launcher: DictConfig) -> bool:
    """Whether a launcher's jobs leave the terminal's last line free.

    The basic launcher, and joblib with `n_jobs=1`, run jobs in this process, where each shows its
    own bar. Ray prints its workers' output at the cursor.
    """
    kind = str(launcher._target_).rpartition(".")[2]
    return kind not in ("BasicLauncher", "RayLauncher") and launcher.get("n_jobs") != 1


def follow(folder: Path, ended: threading.Event) -> None:
    """Show the progress of the sweep until `ended`."""
    with sweep_bar() as show:
        if show is None:
            return
        pause = 0.0
        while not ended.wait(pause):
            began = time.monotonic()
            # Other processes are writing the files.
            with contextlib.suppress(OSError, ValueError, KeyError):
                show(*progress_of(survey(folder)))
            pause = max(INTERVAL, (time.monotonic() - began) / SHARE)


def progress_of(found: Survey) -> tuple[float, int, int]:
    """Runs done, with parts of running ones; all runs; runs at work."""
    ended = sum(line.state in ("finished", "failed") for line in found.lines)
    running = [line for line in found.lines if line.state == "running"]
    parts = sum(line.step / line.steps for line in running if line.step and line.steps)
    return ended + parts, max(found.total or 0, len(found.lines)), len(running)
