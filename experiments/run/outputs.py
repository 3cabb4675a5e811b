"""The folder of all results, made and tried out before anything is computed for it."""

from __future__ import annotations

import os
from pathlib import Path

from experiments.config.names import refuse_way_out, sweep_path
from experiments.errors import ConfigurationError
from experiments.run.files import kind_of, scratch_path

BLOCK = bytes(4096)
LOCKS = (".lock", ".at_work")
WRITTEN = (*LOCKS, "jobs", "multirun.yaml", "optimization_results.yaml")
"""What is written in place in a sweep's folder, by Hydra too; the other files are replaced."""


def open_outputs(outputs: Path, *inside: Path) -> None:
    """Make the folder, and find out whether files can be written there.

    Args:
        inside: where this process is going to write below it.

    Raises:
        ConfigurationError: it is a file or a link to nowhere, it cannot be written, the disk is
            full, or a link leads from one of `inside` out of it.
    """
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{refusal(outputs)}: {reason(outputs, error)}") from error
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


def open_sweep(outputs: str, sweep: str) -> Path:
    """The folder of a sweep, made and found to be writable.

    Raises:
        ConfigurationError: its name is not that of one folder, it cannot be written, or a link
            leads from it out of `outputs`.
    """
    folder = sweep_path(outputs, sweep)
    open_outputs(Path(outputs), folder, *(folder / name for name in WRITTEN))
    for path in (folder / name for name in LOCKS):
        if os.path.lexists(path) and kind_of(path) != "a file":
            message = f"{path} is {kind_of(path)}, and a lock must be a file. Remove it."
            raise ConfigurationError(message)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be made ({error}). Remove it.") from error
    return folder


def refusal(outputs: Path) -> str:
    return f"paths.outputs={str(outputs)!r} is not supported"


def reason(outputs: Path, error: OSError) -> str:
    """Why the folder could not be made: what stands in its way, and what to do."""
    for place in (outputs, *outputs.parents):
        if place.is_symlink() and not place.exists():
            return (
                f"{place} is a link to {os.readlink(place)}, which does not exist. Make that "
                "folder, or remove the link."
            )
        if place.exists():
            if place.is_dir():
                break
            return f"{place} is not a folder. Remove it, or set paths.outputs to another folder."
    return f"it cannot be made ({error.strerror or error}). Set paths.outputs to another folder."
