"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OLD = 24 * 3600
"""Seconds after which a scratch file of an unknown writer is taken for abandoned."""


def write_atomically(
    path: Path, write: Callable[[Path], Any], last: Callable[[], Any] = lambda: None
) -> None:
    """Write a scratch file next to `path`, call `last`, and rename the scratch file to `path`.

    Scratch files of writers that were killed are removed first. The file's mode is what the
    process's umask gives.
    """
    remove_abandoned(path)
    prefix = f".{path.name}.{_host()}-{os.getpid()}-"
    # Not mkstemp, whose files nobody else may read, whatever the umask says.
    temporary = Path(tempfile.mktemp(dir=path.parent, prefix=prefix))
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = temporary.stat().st_mode  # safetensors gives its own
    try:
        write(temporary)
        os.chmod(temporary, mode)
        last()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_abandoned(path: Path) -> None:
    """Remove the scratch files that killed writers of `path` have left."""
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
        except OSError:  # removed by another process meanwhile, or not ours to remove
            continue


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum()) or "host"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True
