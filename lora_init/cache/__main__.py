"""``python -m lora_init.cache [info | clear]``: show or empty the user's cache."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lora_init.cache.location import default_cache


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the folder, entries and bytes of the cache, or remove all entries."""
    parser = argparse.ArgumentParser(prog="python -m lora_init.cache")
    parser.add_argument("command", nargs="?", choices=("info", "clear"), default="info")
    command = parser.parse_args(arguments).command
    cache = default_cache()
    if cache is None:
        print("the cache is off (LORA_INIT_CACHE)")
        return
    if command == "clear":
        removed = cache.clear()
        print(f"{cache.folder}: removed {removed.entries} entries, {removed.bytes:,} bytes")
    else:
        held = cache.usage()
        print(f"{cache.folder}: {held.entries} entries, {held.bytes:,} bytes of {cache.limit:,}")


if __name__ == "__main__":
    main()
