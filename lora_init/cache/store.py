"""The cache folder: one safetensors file per entry, shared between processes without locks.

    <folder>/<first two digits of the key>/<key>-0.safetensors

No locks are needed, for these reasons:

- The key determines the content. Processes that write the same file write the same result.
- A file is renamed to its final name when it is complete (`os.replace`), and never changes after
  that. An open file stays readable when its name is removed.
- Eviction and cleanup only remove files. A removed result is computed again.
- The header holds a checksum over key, metadata and tensors, which every reader verifies. A damaged
  file is removed and counts as a miss.

A killed writer leaves a temporary file, whose name holds the host and the process id. The next
process that uses the cache removes the file if the writer is gone or the file is an hour old.

Disk errors never raise: a lookup is then a miss, with one warning per kind of error. The same holds
if something else (a pipe, a folder, a broken link) has the name of an entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_init.cache.entry import RANK, Entry, bytes_of, deserialized, serialized

KEY = re.compile(r"[0-9a-f]{64}")
SHARD = re.compile(r"[0-9a-f]{2}")
ENTRY = re.compile(r"[0-9a-f]{64}-\d+\.safetensors")
TEMPORARY = re.compile(r"\.(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,9})-[0-9a-f]{16}\.tmp")

ROOM_AFTER_EVICTION = 0.1
"""Fraction of the limit that eviction frees, so that it is rare."""
LOOKS = 64
"""A process scans the folder each time it has written 1/64 of the limit. Each other process that
writes at the same time may exceed the limit by that much."""
ABANDONED_SECONDS = 3600


@dataclass(frozen=True)
class Usage:
    """The number of entries in a cache and their total size."""

    entries: int
    bytes: int


class Cache:
    """A cache in a folder of limited size, which evicts the least recently used entries.

    Args:
        folder: created when the first result is stored. Only files named like entries of the cache
            are read or removed.
        limit: the maximum size in bytes.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self._unwatched = 0  # bytes left to write before the next scan
        self._swept = False
        self._warned: set[str] = set()

    def get(self, key: str) -> Entry | None:
        """Return the entry of the result of `lora_init.cache.key`, or None."""
        path = self._path(key)
        try:
            entry = deserialized(key, bytes_of(path, self.limit))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn_unusable(error)
            return None
        except Exception:  # a damaged file may raise any error of the parser
            self._discard(path)
            return None
        with contextlib.suppress(OSError):  # the access time only affects the order of eviction
            os.utime(path)
        return entry

    def has_room(self, size: int) -> bool:
        """Whether a result of `size` bytes fits into the cache; warns once if it does not."""
        if size <= self.limit * (1 - ROOM_AFTER_EVICTION):
            return True
        self._warn(
            "size",
            f"a result of {size} bytes or more is not cached, because the cache is limited to "
            f"{self.limit} bytes. Set LORA_INIT_CACHE_BYTES to a larger number.",
        )
        return False

    def put(
        self,
        key: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        *,
        durable: bool = True,
    ) -> None:
        """Store an entry, unless the cache has it.

        A result that exceeds the limit is neither copied nor hashed. Disk errors only warn.

        Args:
            key: the result of `lora_init.cache.key`.
            tensors: named tensors on any device, with any strides.
            metadata: JSON values. Tuples are read back as lists.
            durable: call fsync. Without it, a power failure may lose the entry, which is then a
                miss. The end of the process loses nothing.

        Raises:
            TypeError: JSON cannot represent the metadata.
        """
        path = self._path(key)
        if os.path.lexists(path):
            return
        if not self.has_room(sum(tensor.nbytes for tensor in tensors.values())):
            return
        data = serialized(key, tensors, metadata)
        if not self.has_room(len(data)):
            return
        try:
            _write(path, data, durable)
        except OSError as error:
            self._warn_unusable(error)
            return
        self._unwatched -= len(data)
        if self._unwatched < 0:
            self._look_after()

    def usage(self) -> Usage:
        """Count the entries and their bytes."""
        sizes = [found.st_size for _, found in self._files(ENTRY)]
        return Usage(len(sizes), sum(sizes))

    def clear(self) -> Usage:
        """Remove all entries and abandoned temporary files; return how many entries and bytes."""
        self._sweep()
        sizes = [found.st_size for path, found in self._files(ENTRY) if _remove(path)]
        return Usage(len(sizes), sum(sizes))

    def _path(self, key: str) -> Path:
        """The file of an entry; the first call removes what killed writers left behind."""
        if not KEY.fullmatch(key):
            raise ValueError(
                f"key={key!r} is not supported: must be 64 hexadecimal digits. Call "
                "lora_init.cache.key."
            )
        if not self._swept:
            self._sweep()
        return self.folder / key[:2] / f"{key}-{RANK}.safetensors"

    def _discard(self, path: Path) -> None:
        """Remove a damaged entry; a folder that is not empty stays."""
        if _remove(path):
            self._warn(
                "damage",
                f"a damaged file in the cache, {path}, was removed; its result is computed again. "
                "If this happens again, check the disk.",
            )
        else:
            self._warn(
                "obstacle",
                f"{path} is not a file of the cache and cannot be removed; its result is computed "
                "each time. Remove it.",
            )

    def _look_after(self) -> None:
        """Remove abandoned files, and evict the least recently used entries above the limit."""
        self._sweep()
        entries = sorted(self._files(ENTRY), key=lambda file: file[1].st_mtime_ns)
        total = sum(found.st_size for _, found in entries)
        if total > self.limit:
            for path, found in entries:
                if total <= self.limit * (1 - ROOM_AFTER_EVICTION):
                    break
                if _remove(path):
                    total -= found.st_size
        self._unwatched = min(self.limit // LOOKS, self.limit - total)

    def _sweep(self) -> None:
        """Remove the temporary files of killed writers."""
        self._swept = True
        for path, found in self._files(TEMPORARY):
            if _is_abandoned(path.name, found.st_mtime):
                _remove(path)

    def _files(self, names: re.Pattern[str]) -> Iterator[tuple[Path, os.stat_result]]:
        """The files of the cache with matching names; other processes may change them meanwhile."""
        for shard in _listed(self.folder):
            if SHARD.fullmatch(shard.name):
                for file in _listed(Path(shard.path)):
                    if names.fullmatch(file.name):
                        with contextlib.suppress(OSError):
                            found = file.stat(follow_symlinks=False)
                            if not stat.S_ISDIR(found.st_mode):
                                yield Path(file.path), found

    def _warn_unusable(self, error: OSError) -> None:
        self._warn(
            "disk",
            f"the cache in {self.folder} cannot be used ({error}); results are computed each time. "
            "Free disk space, set LORA_INIT_CACHE to another folder, or set it to off.",
        )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)


def _write(path: Path, data: bytes, durable: bool) -> None:
    """Write a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{_host()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def _is_abandoned(name: str, modified: float) -> bool:
    if time.time() - modified > ABANDONED_SECONDS:
        return True
    match = TEMPORARY.fullmatch(name)
    # On POSIX, signal 0 only checks that the process exists. On Windows it would kill it.
    if match is None or os.name != "posix" or match["host"] != _host():
        return False
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # a running process of another user
        return False
    return False


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _remove(path: Path) -> bool:
    """Remove a file or an empty folder; False if that fails, as for open files on Windows."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        with contextlib.suppress(OSError):
            path.rmdir()
            return True
        return False
    return True


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as files:
            return list(files)
    except OSError:
        return []
