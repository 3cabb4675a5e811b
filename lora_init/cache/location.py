"""Find the user's cache folder and its size limit."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

from lora_init.cache.store import Cache

DEFAULT_LIMIT = 5 * 2**30
SWITCHED_OFF = ("off", "0")


def default_cache() -> Cache | None:
    """The user's cache, or None if it is switched off. All calls return the same object.

    The environment variable `LORA_INIT_CACHE` names the folder; "off" or "0" disables the cache.
    The default is "lora_init" in the cache folder of the platform: `$XDG_CACHE_HOME` or ~/.cache on
    Linux, ~/Library/Caches on macOS, `%LOCALAPPDATA%` on Windows. `LORA_INIT_CACHE_BYTES` limits
    the size (default: 5 GiB). The folder is created when the first result is stored.

    Raises:
        ValueError: `LORA_INIT_CACHE_BYTES` is not a positive integer.
    """
    place = os.environ.get("LORA_INIT_CACHE", "")
    if place.lower() in SWITCHED_OFF:
        return None
    try:
        folder = Path(place).expanduser() if place else _platform_folder() / "lora_init"
    except RuntimeError:  # the user has no home folder, as in some containers
        return None
    return _opened(folder.absolute(), _limit())


@cache
def _opened(folder: Path, limit: int) -> Cache:
    return Cache(folder, limit)


def _limit() -> int:
    text = os.environ.get("LORA_INIT_CACHE_BYTES", "")
    if not text:
        return DEFAULT_LIMIT
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(
            f"LORA_INIT_CACHE_BYTES={text!r} is not supported: must be a positive number of bytes, "
            f"such as {DEFAULT_LIMIT}, the default. To disable the cache, set LORA_INIT_CACHE=off."
        )
    return int(text)


def _platform_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
