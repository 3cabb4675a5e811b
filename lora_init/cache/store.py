"""The store: one safetensors file an entry, named by its key and rank; shared without locks.

    <folder>/<first two digits of the key>/<key>-<rank>.safetensors

A decomposition of rank r serves every rank up to r. Its rank is part of its name, so that a larger
one is never overwritten by a smaller one, whoever comes last.

Why no locks are needed:

- The name says what is inside. Processes that write one name at the same time write the same
  result, and it does not matter which of them is last.
- A file gets its name when it is complete (`os.replace`), and is never written to again. A reader
  reads it whole through one open file, which stays readable when the name is taken away.
- Whatever else happens, eviction, sweeping, the removal of a damaged file, takes names away. What
  is lost that way is computed again.
- What a reader returns has the checksum over key, rank, metadata and tensors that the writer put in
  the header. A file that a power cut or a full disk has damaged, or that somebody put there, is
  removed and counts as a miss.

A writer that was killed leaves a temporary file. Its name holds the host and the process id. The
next process that uses the cache removes it if that process is gone, or if the file is an hour old.

A cache never fails its user. Whatever lies in an entry's place (a pipe, a folder, a link to
nothing), a look-up is a miss. What goes wrong on the disk is said in one warning.
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

from lora_init.cache.entry import Entry, bytes_of, deserialized, serialized

KEY = re.compile(r"[0-9a-f]{64}")
SHARD = re.compile(r"[0-9a-f]{2}")
ENTRY = re.compile(r"(?P<key>[0-9a-f]{64})-(?P<rank>\d+)\.safetensors")
TEMPORARY = re.compile(r"\.(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,9})-[0-9a-f]{16}\.tmp")

ROOM_AFTER_EVICTION = 0.1
"""Of the limit: eviction frees more than it must, so that it is rare."""
LOOKS = 64
"""A process looks at the whole folder after writing a 64th of the limit: by so much, for each other
process that writes at the same time, the limit may be exceeded."""
ABANDONED_SECONDS = 3600


@dataclass(frozen=True)
class Usage:
    """How much a cache holds."""

    entries: int
    bytes: int


class Cache:
    """Results by key, in a folder of limited size; the least recently used go first.

    Args:
        folder: created when something is stored. Only files with the cache's own names are read or
            removed there.
        limit: in bytes.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self._unwatched = 0  # bytes that this process may write before it looks at the folder
        self._swept = False
        self._warned: set[str] = set()

    def get(self, key: str, *, rank: int | None = None) -> Entry | None:
        """The smallest entry of this key that has at least this rank; None if there is none.

        Args:
            key: from `lora_init.cache.key`.
            rank: how much of a decomposition is needed. The entry may hold more: truncate it.
        """
        for stored in self._ranks(key):
            if stored >= (rank or 0):
                entry = self._read(key, stored)
                if entry is not None:
                    return entry
        return None

    def has_room(self, size: int) -> bool:
        """Whether the limit admits a result of so many bytes; warns once where it does not."""
        if size <= self.limit * (1 - ROOM_AFTER_EVICTION):
            return True
        self._warn(
            "size",
            f"a result of {size} bytes or more is not cached, because the cache is limited to "
            f"{self.limit} bytes. Set LORA_INIT_CACHE_BYTES to a larger limit",
        )
        return False

    def put(
        self,
        key: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        *,
        rank: int | None = None,
        durable: bool = True,
    ) -> None:
        """Store an entry, unless one of this or a larger rank is there; smaller ones are replaced.

        A result that is larger than the limit is neither copied nor hashed.

        Args:
            key: from `lora_init.cache.key`.
            tensors: of any device and strides, by names.
            metadata: what JSON can say; tuples come back as lists.
            rank: of a decomposition that serves every smaller rank too; None if it serves no other.
            durable: wait until the disk has it. Without, a power cut shortly after may lose the
                entry, which is then a miss; the end of a process loses nothing.

        Raises:
            TypeError: metadata that JSON cannot say. Trouble with the disk is only warned of.
        """
        ranks = self._ranks(key)
        if any(stored >= (rank or 0) for stored in ranks):
            return
        if not self.has_room(sum(tensor.nbytes for tensor in tensors.values())):
            return
        data = serialized(key, rank or 0, tensors, metadata)
        if not self.has_room(len(data)):
            return
        try:
            _write(self._path(key, rank or 0), data, durable)
        except OSError as error:
            self._warn_unusable(error)
            return
        for smaller in ranks:
            _remove(self._path(key, smaller))
        self._unwatched -= len(data)
        if self._unwatched < 0:
            self._look_after()

    def usage(self) -> Usage:
        """Entries and their bytes."""
        sizes = [found.st_size for _, found in self._files(ENTRY)]
        return Usage(len(sizes), sum(sizes))

    def clear(self) -> Usage:
        """Remove every entry, and what killed writers left; returns what the entries were."""
        self._sweep()
        sizes = [found.st_size for path, found in self._files(ENTRY) if _remove(path)]
        return Usage(len(sizes), sum(sizes))

    def _path(self, key: str, rank: int) -> Path:
        return self.folder / key[:2] / f"{key}-{rank}.safetensors"

    def _ranks(self, key: str) -> list[int]:
        """The ranks stored under this key, ascending; 0 is an entry that has none."""
        if not KEY.fullmatch(key):
            raise ValueError(f"cache: {key!r} is not a key; make one with lora_init.cache.key")
        if not self._swept:
            self._sweep()
        try:
            names = os.listdir(self.folder / key[:2])
        except FileNotFoundError:
            return []
        except OSError as error:
            self._warn_unusable(error)
            return []
        found = [ENTRY.fullmatch(name) for name in names if name.startswith(key)]
        return sorted(int(match["rank"]) for match in found if match)

    def _read(self, key: str, rank: int) -> Entry | None:
        path = self._path(key, rank)
        try:
            entry = deserialized(key, rank, bytes_of(path, self.limit))
        except FileNotFoundError:  # evicted since it was listed
            return None
        except OSError as error:
            self._warn_unusable(error)
            return None
        except Exception:  # what a damaged file raises depends on the parser
            self._discard(path)
            return None
        with contextlib.suppress(OSError):  # the order of eviction is best effort
            os.utime(path)
        return entry

    def _discard(self, path: Path) -> None:
        """Make room for the entry that belongs here; a folder with files in it stays."""
        if _remove(path):
            self._warn(
                "damage",
                f"a damaged file in the cache, {path}, was removed; its result is computed again. "
                "If this happens again, check the disk",
            )
        else:
            self._warn(
                "obstacle",
                f"{path} is not a file of the cache and cannot be removed; its result is computed "
                "each time. Remove it",
            )

    def _look_after(self) -> None:
        """Sweep, and evict the least recently used entries where the limit is exceeded."""
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
        """The cache's own files of one kind; they may come and go meanwhile."""
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
            "Make room, or name another folder in LORA_INIT_CACHE, or set it to off",
        )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)


def _write(path: Path, data: bytes, durable: bool) -> None:
    """Write a file that is there completely or not at all."""
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
    # Signal 0 only asks, on POSIX; on Windows it would reach the process.
    if os.name != "posix" or match["host"] != _host():
        return False
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # alive, another user's
        return False
    return False


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _remove(path: Path) -> bool:
    """Remove a file or an empty folder; False if it stays, as on Windows while it is read."""
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
