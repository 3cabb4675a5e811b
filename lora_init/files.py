"""Write files atomically, so that a reader never sees half a file."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OLD = 24 * 3600
"""Seconds after which a scratch file from another host counts as abandoned."""


def write_atomically(
    path: Path, write: Callable[[Path], Any], last: Callable[[], Any] = lambda: None
) -> None:
    """Write a file completely or not at all.

    A scratch file next to `path` is written and then renamed to `path`. Scratch files of killed
    writers are removed first. The umask of the process sets the mode of the file.

    Args:
        path: the file to write. Its folder must exist.
        write: writes the content to the path that it gets.
        last: is called after `write` and before the file is renamed.
    """
    remove_abandoned(path)
    prefix = f".{path.name}.{_host()}-{os.getpid()}-"
    # mkstemp ignores the umask: it lets only the owner read its files.
    temporary = Path(tempfile.mktemp(dir=path.parent, prefix=prefix))
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = temporary.stat().st_mode  # safetensors sets another mode
    try:
        write(temporary)
        os.chmod(temporary, mode)
        last()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_abandoned(path: Path) -> None:
    """Remove the scratch files that killed writers of `path` left behind."""
    for scratch in path.parent.glob(f".{path.name}.*"):
        host, _, rest = scratch.name.removeprefix(f".{path.name}.").partition("-")
        process = rest.partition("-")[0]
        try:
            if host == _host() and process.isdigit():
                abandoned = not _is_running(int(process))
            else:
                abandoned = scratch.stat().st_mtime < time.time() - OLD
            if abandoned:
                scratch.unlink(missing_ok=True)
        except OSError:  # another process removed it, or we have no permission
            continue


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum()) or "host"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # a process of another user
        return True
    return True
