"""A bar over a sweep whose runs work in other processes: a Hydra callback.

A launcher such as joblib gives the runs away and waits. The runs' own bars would write over each
other on one terminal, so that they show none; what they have reached stands in their folders.
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

from experiments.console import sweep_bar
from experiments.sweep.manifest import sweep_folder
from experiments.sweep.status.survey import Survey, survey

INTERVAL = 1.0
SHARE = 0.02
"""Of the time, that looking may take: five thousand folders are not looked at every second."""


class SweepBar(Callback):
    """Configured as `hydra.callbacks.bar`, after the manifest, whose files it reads."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type[SweepBar], tuple[()]]:
        """Hydra sends every callback along with each job, where there is no bar."""
        return SweepBar, ()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not leaves_a_line(config.hydra.launcher):
            return
        self.thread = threading.Thread(
            target=follow, args=(sweep_folder(config), self.ended), daemon=True
        )
        self.thread.start()
        atexit.register(self.end)  # whatever happens, the terminal gets its cursor back
        self.end_when_interrupted()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.end()

    def end_when_interrupted(self) -> None:
        """Before whoever handles Ctrl-C: what it prints is not to have a bar between its lines."""
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

    The basic launcher has the runs here, one after the other, as joblib has with `n_jobs=1`: each
    shows a bar of its own. Ray prints what its workers print wherever the cursor stands.
    """
    kind = str(launcher._target_).rpartition(".")[2]
    return kind not in ("BasicLauncher", "RayLauncher") and launcher.get("n_jobs") != 1


def follow(folder: Path, ended: threading.Event) -> None:
    """Show how far the sweep is until `ended`."""
    with sweep_bar() as show:
        if show is None:
            return
        pause = 0.0
        while not ended.wait(pause):
            began = time.monotonic()
            # Its files are written by others, meanwhile.
            with contextlib.suppress(OSError, ValueError, KeyError):
                show(*progress_of(survey(folder)))
            pause = max(INTERVAL, (time.monotonic() - began) / SHARE)


def progress_of(found: Survey) -> tuple[float, int, int]:
    """Runs done, parts of running ones included; how many there are; how many are at work."""
    ended = sum(line.state in ("finished", "failed") for line in found.lines)
    running = [line for line in found.lines if line.state == "running"]
    parts = sum(line.step / line.steps for line in running if line.step and line.steps)
    return ended + parts, max(found.total or 0, len(found.lines)), len(running)
