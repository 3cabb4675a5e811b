"""The folder of all results, made and tested before anything is computed for it."""

from __future__ import annotations

import os
from pathlib import Path

from ..config.names import refuse_way_out
from ..errors import ConfigurationError
from .files import scratch_path

BLOCK = bytes(4096)


def open_outputs(outputs: Path, *inside: Path) -> None:
    """Make the folder, and test whether files can be written there.

    Args:
        inside: the paths below it that this process is going to write.

    Raises:
        ConfigurationError: it is a file or a dangling link, it cannot be written, the disk is
            full, or a link leads from one of `inside` out of it.
    """
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{refusal(outputs)}: {obstacle(outputs, error)}") from error
    refuse_way_out(outputs, *inside)
    probe = scratch_path(outputs / "probe")
    try:
        with probe.open("xb") as file:
            file.write(BLOCK)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigurationError(
            f"{refusal(outputs)}: nothing can be written there ({error.strerror or error}). Make "
            "room or change its permissions, or set paths.outputs to another folder."
        ) from error
    finally:
        probe.unlink(missing_ok=True)


def refusal(outputs: Path) -> str:
    return f"paths.outputs={str(outputs)!r} is not supported"


def obstacle(outputs: Path, error: OSError) -> str:
    """Why the folder could not be made, and what to do."""
    for place in (outputs, *outputs.parents):
        if place.is_symlink() and not place.exists():
            target = f"a link to {os.readlink(place)}, which does not exist"
            return f"{place} is {target}. Make that folder, or remove the link."
        if place.exists():
            if place.is_dir():
                break
            return f"{place} is not a folder. Remove it, or set paths.outputs to another folder."
    return f"it cannot be made ({error.strerror or error}). Set paths.outputs to another folder."
