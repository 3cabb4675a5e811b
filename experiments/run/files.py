"""Files that are read whole or refused, and replaced whole or not at all.

A reader gets the bytes of a regular file or an error: a pipe in its place does not block it.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any

from lora_init.files import write_atomically

from ..errors import ConfigurationError

KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link"}


def read_regular(path: Path, *, links: bool = True) -> bytes:
    """The bytes of a regular file.

    Args:
        links: whether the path may be a symbolic link.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is a folder, a pipe, a device or, without `links`, a symbolic link.
    """
    kind = kind_of(path, links)
    if kind != "a file":
        raise ValueError(f"it is {kind}, not a file")
    # O_NONBLOCK: a pipe that replaced the file meanwhile does not block the reader.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def kind_of(path: Path, links: bool = False) -> str:
    """ "a file", "a folder", "a symbolic link" or "a pipe or a device".

    Raises:
        FileNotFoundError: there is nothing at the path.
    """
    mode = (os.stat if links else os.lstat)(path).st_mode
    return KINDS.get(stat.S_IFMT(mode), "a pipe or a device")


def read_object(path: Path, *, links: bool = True) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is not a regular file, or it does not hold a JSON object.
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
        ValueError: it is not JSON, it is nested too deeply, or a string in it holds half of a
            surrogate pair, which cannot be written to any file.
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


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file, completely or not at all."""
    write_text(path, json.dumps(finite(content), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file, completely or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file, completely or not at all: after a crash the old content is still there."""

    def write(scratch: Path) -> None:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def scratch_path(path: Path) -> Path:
    """A hidden path next to `path`, to write to before renaming."""
    return path.parent / f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


def finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; what a link leads to stays.

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
