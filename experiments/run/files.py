"""Files that are read whole, replaced whole, and found out when they are something else.

A reader gets the bytes of a regular file, or an error: a pipe in a file's place does not make it
wait. A writer names its temporary file after its process. The next writer in that folder removes
those of processes that are gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from pathlib import Path
from typing import Any

from experiments.errors import ConfigurationError

SCRATCH = re.compile(r"\..+-(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,9})-[0-9a-f]{8}\.tmp")
KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link"}
ABANDONED_SECONDS = 24 * 3600
"""Age at which a temporary file of another machine, whose processes are unknown here, is old."""


def read_regular(path: Path, *, links: bool = True) -> bytes:
    """The bytes of a regular file.

    Args:
        links: whether the path may be a symbolic link.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: it cannot be read.
        ValueError: it is a folder, a pipe, a device or, without `links`, a symbolic link.
    """
    kind = kind_of(path, links)
    if kind != "a file":
        raise ValueError(f"it is {kind}, not a file")
    # O_NONBLOCK: a pipe that comes in between does not make the reader wait.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def kind_of(path: Path, links: bool = False) -> str:
    """ "a file", "a folder", "a symbolic link" or "a pipe or a device".

    Raises:
        FileNotFoundError: there is nothing.
    """
    mode = (os.stat if links else os.lstat)(path).st_mode
    return KINDS.get(stat.S_IFMT(mode), "a pipe or a device")


def read_object(path: Path, *, links: bool = True) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: it cannot be read.
        ValueError: it is no regular file, or it holds no JSON object.
    """
    return as_object(read_regular(path, links=links))


def as_object(text: bytes) -> dict[str, Any]:
    value = as_value(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def as_value(text: bytes) -> Any:
    """The JSON value of a text.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: it is nested too deeply, or half of a surrogate pair stands alone in a string:
            such a string cannot be written to any file.
    """
    try:
        value = json.loads(text)
        if b"\\u" in text or b"\xed" in text:  # how a surrogate is written
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"it holds half of a surrogate pair, {half!r}") from error
    return value


def scratch_path(path: Path) -> Path:
    """Where to write what is going to be `path`; removes what killed writers left there."""
    remove_abandoned(path.parent)
    return path.parent / f".{path.name}-{host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files and folders of processes that are gone."""
    try:
        found = [entry.path for entry in os.scandir(folder) if SCRATCH.fullmatch(entry.name)]
    except OSError:
        return
    for path in map(Path, found):
        if is_abandoned(path):
            remove(path)


def is_abandoned(path: Path) -> bool:
    match = SCRATCH.fullmatch(path.name)
    if match["host"] != host():
        try:
            return time.time() - path.lstat().st_mtime > ABANDONED_SECONDS
        except OSError:
            return False
    try:
        os.kill(int(match["pid"]), 0)  # only asks
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it lives, and is another user's
        return False
    return False


def host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; never what a link leads to.

    Raises:
        ConfigurationError: it cannot be removed.
    """
    try:
        if kind_of(path) == "a folder":
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        message = f"{path} cannot be removed ({error}). Remove it by hand."
        raise ConfigurationError(message) from error
