"""Names from the configuration that become folders below `paths.outputs`.

A name is one folder. Separators, `..`, look-alike characters and links that leave `paths.outputs`
are refused before anything is written or deleted.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .bounds import check_path, refusal

NAME = re.compile(r"\w(?:[\w .,+=@-]*[\w+=@-])?")
LONGEST = 200
"""In bytes. File systems allow 255; temporary files need some of them."""


def check_name(setting: str, value: Any) -> str:
    """The value, if it is safe as the name of one folder.

    Raises:
        ConfigurationError: it is not.
    """
    normal = isinstance(value, str) and unicodedata.normalize("NFKC", value) == value
    if normal and NAME.fullmatch(value) and len(value.encode()) <= LONGEST:
        return value
    must_be = "the name of one folder: letters, digits, spaces and . _ - + = , @, at most "
    fix = "Start with a letter or a digit, without a slash; paths.outputs chooses the place"
    raise refusal(setting, value, f"{must_be}{LONGEST} bytes", fix)


def check_outputs(value: Any) -> str:
    """The folder of all results, as given.

    Raises:
        ConfigurationError: it is empty or starts with "~".
    """
    check_path("paths.outputs", value)
    if value.startswith("~"):
        home = os.path.expanduser("~")
        fix = f"Write {home}{value[1:] if value[1:2] == '/' else '/…'}"
        must_be = 'a path without "~", which only a shell replaces'
        raise refusal("paths.outputs", value, must_be, fix)
    return value


def sweep_path(outputs: str, sweep: str) -> Path:
    """The folder of a sweep.

    Raises:
        ConfigurationError: the name is not safe.
    """
    return Path(check_outputs(outputs)) / "sweeps" / check_name("sweep", sweep)


def refuse_way_out(outputs: Path, *paths: Path) -> None:
    """Refuse links below `outputs` that lead out of it. `outputs` itself may be a link.

    Raises:
        ConfigurationError: writing to one of these paths would write outside `outputs`.
    """
    for path in paths:
        try:
            root, place = outputs.resolve(), path.resolve()
        except (OSError, RuntimeError) as error:  # a circle of links
            raise ConfigurationError(
                f"{path} is not supported: its links form a circle ({error}). Remove them."
            ) from error
        if not place.is_relative_to(root):
            raise ConfigurationError(
                f"{path} is not supported: a link leads to {place}, outside "
                f"paths.outputs={str(outputs)!r}. Remove the link, or set paths.outputs to the "
                "folder for the results."
            )
