"""One process per run: a file lock next to the run's folder, and a heartbeat inside it.

The operating system frees the lock when its process ends, also by kill -9. Some network file
systems do not share locks between machines. There the heartbeat decides: a run is taken while
another machine has reported progress within the last `STALE` seconds. Two machines that start the
same run at the same instant may then both get it.
"""

from __future__ import annotations

import calendar
import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ..console import say
from ..errors import ConfigurationError, RunElsewhere
from .files import kind_of, read_object, remove, write_json
from .folder import RunFolder

HEARTBEAT = 10.0
STALE = 120.0
POLL = 0.5
LOOK_SECONDS = 0.2
"""How long to try for a lock: a process that asks whether it is held holds it for an instant."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""The errors of a file system without locks, where only heartbeats are left."""
CLOCK = "%Y-%m-%dT%H:%M:%SZ"


class Claim:
    """The right to work on a run, which `running.json` shows to others."""

    def __init__(self, folder: RunFolder, steps: int) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {
            "run_id": folder.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": now(),
            "step": 0,
            "steps": steps,
        }
        self.ended = threading.Event()
        # A thread, because an initialization may take longer than STALE.
        self.thread = threading.Thread(target=self.keep_beating, daemon=True)

    def begin(self) -> None:
        """Start the heartbeat; the folder must be ready."""
        self.beat()
        if self.thread.ident is None:
            self.thread.start()

    def beat(self) -> None:
        write_json(self.folder.running_file, {**self.facts, "updated": now()})

    def reached(self, step: int, steps: int) -> None:
        """Set steps done and planned (a budget may lower them) for the next heartbeat."""
        self.facts.update(step=step, steps=steps)

    def keep_beating(self) -> None:
        while not self.ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a full disk must not end the run here
                self.beat()

    def end(self) -> None:
        self.ended.set()
        if self.thread.ident is not None:
            self.thread.join()


@contextlib.contextmanager
def claim(
    folder: RunFolder, steps: int, accelerator: Accelerator, *, wait: bool = False
) -> Iterator[Claim]:
    """Hold the run. If several processes train it together, the first holds it for all.

    An interrupted process leaves `running.json` behind, as a killed one does.

    Raises:
        RunElsewhere: another process works on the run, and `wait` is False.
    """
    held, refusal = None, None
    if accelerator.is_main_process:
        try:
            held = acquire(folder, wait)
        except RunElsewhere as error:
            refusal = str(error)
    if accelerator.num_processes > 1:
        refusal = broadcast_object_list([refusal])[0]
    if refusal is not None:
        raise RunElsewhere(refusal)
    mine, interrupted = Claim(folder, steps), True
    try:
        yield mine
        interrupted = False
    except Exception:
        interrupted = False
        raise
    finally:
        mine.end()
        if held is not None:
            if not interrupted:
                remove(folder.running_file)
            release(folder, held)


def acquire(folder: RunFolder, wait: bool) -> FileLock:
    """The run's lock, held.

    Raises:
        RunElsewhere: another process works on the run, and `wait` is False.
        ConfigurationError: the lock's file cannot be made.
    """
    said = False
    while True:
        held = lock(folder)
        if held is not None:
            if not beats_elsewhere(folder):
                return held
            held.release()
        if not wait:
            raise RunElsewhere(f"{describe(folder)}; its results will be in {folder.path}")
        if not said:
            say(f"  waiting: {describe(folder)}")
            said = True
        time.sleep(POLL)


def lock(folder: RunFolder) -> FileLock | None:
    """Lock the run; None if another process holds the lock."""
    path = folder.lock_file
    held = FileLock(path, timeout=LOOK_SECONDS, poll_interval=0.02, thread_local=False)
    # Another process may remove the file or its empty folder at any step here. What a call misses
    # or finds in its way then is gone at the next try.
    tries = 100
    try:
        while True:
            tries -= 1
            try:
                if os.path.lexists(path) and (kind := kind_of(path)) != "a file":
                    raise ConfigurationError(
                        f"{path} is {kind}, and a lock must be a file. Remove it."
                    )
                path.parent.mkdir(parents=True, exist_ok=True)
                held.acquire()
                return held
            except (FileNotFoundError, FileExistsError):
                if not tries:
                    raise
    except Timeout:
        return None
    except OSError as error:
        if error.errno in NO_LOCKS:
            return held
        raise ConfigurationError(f"{path} cannot be locked ({error}). Remove it.") from error


def release(folder: RunFolder, held: FileLock) -> None:
    """Remove the lock's file while it is locked, then unlock it."""
    folder.lock_file.unlink(missing_ok=True)
    held.release()
    with contextlib.suppress(OSError):
        folder.path.parent.rmdir()  # only if it is empty, as after a wrong setting


def is_held(folder: RunFolder) -> bool:
    """Whether a process works on the run at this moment."""
    if folder.lock_file.is_file():
        try:
            with FileLock(folder.lock_file, blocking=False, thread_local=False):
                pass
        except Timeout:
            return True
        except OSError:  # a file of another user: only the heartbeat can say
            return (heartbeat(folder) or {"age": STALE})["age"] < STALE
    return beats_elsewhere(folder)


def heartbeat(folder: RunFolder) -> dict[str, Any] | None:
    """What `running.json` holds, and `age`, the seconds since it was written.

    Returns:
        None if there is no such file, or if it is damaged.
    """
    try:
        facts = read_object(folder.running_file)
        age = time.time() - calendar.timegm(time.strptime(facts["updated"], CLOCK))
        numbers = [facts["pid"], facts["step"], facts["steps"]]
        if not isinstance(facts["host"], str) or any(type(n) is not int for n in numbers):
            return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    # Clocks differ a little. A time further ahead is damage, and would never become stale.
    return None if age < -STALE else {**facts, "age": max(age, 0.0)}


def beats_elsewhere(folder: RunFolder) -> bool:
    """Whether another machine has reported work on the run lately."""
    facts = heartbeat(folder)
    return facts is not None and facts["host"] != socket.gethostname() and facts["age"] < STALE


def describe(folder: RunFolder) -> str:
    facts = heartbeat(folder)
    if facts is None:
        return "another process works on this run"
    return (
        f"process {facts['pid']} on {facts['host']} works on this run (step {facts['step']} of "
        f"{facts['steps']}, {facts['age']:.0f} s ago)"
    )


def now() -> str:
    return time.strftime(CLOCK, time.gmtime())
