"""Names from the configuration that become folders below `paths.outputs`.

A name is one folder. It can lead nowhere else: separators, `..`, characters that look like these
and links that leave `paths.outputs` are refused before anything is written or deleted.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from experiments.config.bounds import check_path, refusal
from experiments.errors import ConfigurationError

NAME = re.compile(r"\w(?:[\w .,+=@-]*[\w+=@-])?")
LONGEST = 200
"""In bytes. File systems hold 255; temporary files need some of them."""


def check_name(setting: str, value: Any) -> str:
    """The name, if it is safe as that of one folder.

    Raises:
        ConfigurationError: it is none.
    """
    plain = isinstance(value, str) and unicodedata.normalize("NFKC", value) == value
    if plain and NAME.fullmatch(value) and len(value.encode()) <= LONGEST:
        return value
    raise refusal(
        setting,
        value,
        f"the name of one folder: letters, digits, spaces and . _ - + = , @, at most {LONGEST} "
        "bytes",
        "It begins with a letter or a digit and holds no slash; choose the place of all results "
        "by paths.outputs",
    )


def check_outputs(value: Any) -> str:
    """The folder of all results, as given.

    Raises:
        ConfigurationError: it is empty or starts with "~".
    """
    check_path("paths.outputs", value)
    if value.startswith("~"):
        raise refusal(
            "paths.outputs",
            value,
            'a path without "~", which only a shell replaces',
            f"Write {os.path.expanduser('~')}{value[1:] if value[1:2] == '/' else '/…'}",
        )
    return value


def sweep_path(outputs: str, sweep: str) -> Path:
    """The folder of a sweep.

    Raises:
        ConfigurationError: a name that is not safe.
    """
    return Path(check_outputs(outputs)) / "sweeps" / check_name("sweep", sweep)


def refuse_way_out(outputs: Path, *paths: Path) -> None:
    """Refuse links below `outputs` that lead out of it. `outputs` itself may be a link.

    Raises:
        ConfigurationError: what is written to one of these paths would lie elsewhere.
    """
    for path in paths:
        try:
            root, place = outputs.resolve(), path.resolve()
        except (OSError, RuntimeError) as error:  # a circle of links
            raise ConfigurationError(
                f"{path} is not supported: its links lead in a circle ({error}). Remove them."
            ) from error
        if not place.is_relative_to(root):
            raise ConfigurationError(
                f"{path} is not supported: a link leads to {place}, outside "
                f"paths.outputs={str(outputs)!r}, where nothing is written or deleted. Remove the "
                "link, or set paths.outputs to the folder that the results should go to."
            )
