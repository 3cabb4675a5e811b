"""Strict reading of a user's JSON lines and JSON lists.

Only a line feed ends a line: JSON strings may hold U+2028, U+2029 and U+0085, at which
`str.splitlines` would cut them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BOM = b"\xef\xbb\xbf"


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line that is not blank.

    Raises:
        ValueError: a line that is not UTF-8 or not JSON, with its number.
    """
    for number, line in enumerate(path.read_bytes().removeprefix(BOM).split(b"\n"), start=1):
        if line.strip():
            try:
                yield number, parse(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def parse(text: bytes) -> Any:
    """The value of one JSON text in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8 or not JSON, or an object has a key twice.
    """
    try:
        return json.loads(text.removeprefix(BOM).decode(), object_pairs_hook=without_repeats)
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object, unless a key occurs twice: its value would be ambiguous."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs more than once in an object")
    return made
