"""Where the user's cache is, and how large: two environment variables and the platform's custom."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

from lora_init.cache.store import Cache

DEFAULT_LIMIT = 5 * 2**30
SWITCHED_OFF = ("off", "0")


def default_cache() -> Cache | None:
    """The user's cache, the same object at every call; None where it is switched off.

    `LORA_INIT_CACHE` is its folder, or "off" or "0" for none; by default "lora_init" in the
    platform's cache folder: `$XDG_CACHE_HOME` or ~/.cache, on macOS ~/Library/Caches, on Windows
    `%LOCALAPPDATA%`. `LORA_INIT_CACHE_BYTES` limits its size, by default to 5 GiB. Nothing is
    created before something is stored.

    Raises:
        ValueError: `LORA_INIT_CACHE_BYTES` is not a positive number.
    """
    place = os.environ.get("LORA_INIT_CACHE", "")
    if place.lower() in SWITCHED_OFF:
        return None
    try:
        folder = Path(place).expanduser() if place else _platform_folder() / "lora_init"
    except RuntimeError:  # a user without a home, as in some containers
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
            f"LORA_INIT_CACHE_BYTES={text!r}: expected a positive number of bytes, such as "
            f"{DEFAULT_LIMIT}, the default; to do without a cache, set LORA_INIT_CACHE=off"
        )
    return int(text)


def _platform_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
