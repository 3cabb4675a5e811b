"""Processes that a test starts: the ranks of a group, and an application to be killed.

They are forks: torch and transformers take longer to be imported than most of their work does.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import multiprocessing


def run_ranks(work: Callable[[int, str], None], folder: object, world: int = 2) -> None:
    """``work(rank, folder)`` in `world` processes at a time; raises what one of them raised."""
    gc.collect()  # a group of this process that a fork collected would wait for threads left here
    multiprocessing.start_processes(work, (str(folder),), nprocs=world, start_method="fork")


@dataclass(frozen=True)
class Started:
    """An application in a process of its own.

    Attributes:
        told: where its standard output and error go.
    """

    process: multiprocessing.Process
    told: Path

    @property
    def text(self) -> str:
        return self.told.read_text()

    def running(self) -> bool:
        return self.process.exitcode is None

    def kill(self) -> None:
        """As `kill -9` does: nothing is tidied up."""
        self.process.kill()
        self.process.join()

    def wait(self, seconds: float) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode


def start(main: Callable[[], None], *arguments: str, cwd: Path, told: Path) -> Started:
    """`main` with a command line, in the folder `cwd`."""
    gc.collect()  # as above
    process = multiprocessing.get_context("fork").Process(
        target=_as_command, args=(main, arguments, cwd, told)
    )
    process.start()
    return Started(process, told)


def _as_command(main: Callable[[], None], arguments: tuple[str, ...], cwd: Path, told: Path):
    os.chdir(cwd)
    sys.argv = ["train", *arguments]
    with told.open("w", buffering=1) as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
        sys.stdout = sys.stderr = stream
        main()
