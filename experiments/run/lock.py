"""One process a run: a lock of the operating system beside the run's folder, a heartbeat inside it.

The kernel frees the lock however its process ends, kill -9 included: a free lock means that nobody
works on the run. NFS and Lustre (`-o flock`) pass such locks on to other machines. On a network
file system that does not, the heartbeat stands in: a run that another machine said to work on less
than `STALE` seconds ago is taken, and one that it abandoned is free again after that. There two
machines that begin the same run within the same instant may both get it.
"""

from __future__ import annotations

import calendar
import contextlib
import errno
import fcntl
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from experiments.console import say
from experiments.errors import ConfigurationError, RunElsewhere
from experiments.run.files import kind_of, read_object, remove
from experiments.run.folder import RunFolder, write_json

HEARTBEAT = 10.0
STALE = 120.0
POLL = 0.5
REMOVALS = 1000
"""So often a lock's folder may vanish while the lock is made, before that is an error."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""What a file system answers that has no locks at all: heartbeats alone have to do there."""
CLOCK = "%Y-%m-%dT%H:%M:%SZ"


class Claim:
    """The right to work on a run, told to others by `running.json`."""

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
        # A thread: an initialization may take longer than STALE without a step in between.
        self.thread = threading.Thread(target=self.keep_beating, daemon=True)

    def begin(self) -> None:
        """The folder is ready: tell of the work in it, again and again."""
        write_json(self.folder.running_file, {**self.facts, "updated": now()})
        if self.thread.ident is None:
            self.thread.start()

    def reached(self, step: int, steps: int) -> None:
        """Steps done and planned (fewer where a budget ends first), for the next heartbeat."""
        self.facts.update(step=step, steps=steps)

    def keep_beating(self) -> None:
        while not self.ended.wait(HEARTBEAT):
            # A full disk ends the run where it matters, not here.
            with contextlib.suppress(OSError):
                write_json(self.folder.running_file, {**self.facts, "updated": now()})

    def end(self) -> None:
        self.ended.set()
        if self.thread.ident is not None:
            self.thread.join()


@contextlib.contextmanager
def claim(
    folder: RunFolder, steps: int, accelerator: Accelerator, *, wait: bool = False
) -> Iterator[Claim]:
    """Hold the run; of several processes that train it together, the first holds it for all.

    `running.json` is left behind by a process that is interrupted, as by one that is killed.

    Raises:
        RunElsewhere: another process works on it, and `wait` is False.
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


def acquire(folder: RunFolder, wait: bool) -> int:
    """The descriptor of the locked file."""
    told = False
    while True:
        descriptor = lock(folder.lock_file)
        if descriptor is not None:
            if not beats_elsewhere(folder):
                return descriptor
            os.close(descriptor)
        if not wait:
            raise RunElsewhere(f"{describe(folder)}; its results will be in {folder.path}")
        if not told:
            say(f"  waiting: {describe(folder)}")
            told = True
        time.sleep(POLL)


def lock(path: Path) -> int | None:
    """Lock the file, made if there is none; None if another process holds it for a while.

    Raises:
        ConfigurationError: something else stands in the file's place, or it cannot be made.
    """
    tries = 0
    while tries < 3:  # `is_held` of another process may be looking at this instant
        descriptor = open_lock(path)
        if try_lock(descriptor):
            # Its last holder removes the file: a lock on the removed one would keep nobody out.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        os.close(descriptor)
        tries += 1
        time.sleep(0.02)
    return None


def open_lock(path: Path) -> int:
    """The file, opened. Another process may remove its folder, being empty, in the same instant.

    Raises:
        ConfigurationError: it cannot be made.
    """
    for attempt in range(REMOVALS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return open_regular(path, os.O_RDWR | os.O_CREAT)
        except (FileNotFoundError, FileExistsError) as error:
            if attempt + 1 == REMOVALS or path.parent.is_symlink() or path.parent.is_file():
                raise ConfigurationError(f"{path} cannot be made ({error})") from error
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be opened ({error})") from error
    raise AssertionError


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of the file itself: never of what a link leads to, never waiting for a pipe.

    Raises:
        ConfigurationError: a link, a folder or a pipe has its name.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        descriptor = None
    if descriptor is None or not stat.S_ISREG(os.fstat(descriptor).st_mode):
        if descriptor is not None:
            os.close(descriptor)
        raise ConfigurationError(
            f"{path} is {kind_of(path)}, and a lock must be a file. Remove it."
        )
    return descriptor


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def release(folder: RunFolder, descriptor: int) -> None:
    """Remove the lock file while it is still locked, then unlock."""
    folder.lock_file.unlink(missing_ok=True)
    os.close(descriptor)
    with contextlib.suppress(OSError):
        folder.path.parent.rmdir()  # a mistake found before the first run leaves nothing behind


def is_held(folder: RunFolder) -> bool:
    """Whether a process works on the run at this moment."""
    try:
        # Shared, for which reading is enough: the run may be another user's.
        descriptor = open_regular(folder.lock_file, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError, ConfigurationError):
        return beats_elsewhere(folder)
    try:
        return not try_lock(descriptor, fcntl.LOCK_SH) or beats_elsewhere(folder)
    finally:
        os.close(descriptor)


def wait_until_free(folder: RunFolder) -> None:
    while is_held(folder):
        time.sleep(POLL)


def heartbeat(folder: RunFolder) -> dict[str, Any] | None:
    """What `running.json` holds, and `age`, the seconds since it was written; None without one, or
    where it is damaged."""
    try:
        facts = read_object(folder.running_file)
        age = time.time() - seconds(facts["updated"])
        numbers = [facts["pid"], facts["step"], facts["steps"]]
        if not isinstance(facts["host"], str) or any(type(n) is not int for n in numbers):
            return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    # Clocks differ a little. What comes from further ahead is damage, and would never be too old.
    return None if age < -STALE else {**facts, "age": max(age, 0.0)}


def beats_elsewhere(folder: RunFolder) -> bool:
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


def seconds(clock: str) -> float:
    return calendar.timegm(time.strptime(clock, CLOCK))
