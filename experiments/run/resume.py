"""Where a run starts: at its result, at its checkpoint, or at the beginning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from lora_init import LoraModel

from ..config.run_config import RunConfig
from ..console import say
from ..errors import DamagedFile
from ..training.checkpoint import (
    FORMAT_WITHOUT_CHECKSUM,
    Checkpoints,
    Saved,
    parse_checkpoint,
)
from .environment import describe_environment
from .files import (
    kind_of,
    read_object,
    read_regular,
    remove,
    write_bytes,
    write_json,
    write_text,
)
from .folder import RunFolder
from .lock import Claim
from .metrics import read_metrics


def make_checkpoints(
    run: RunConfig,
    folder: RunFolder,
    saved: Saved | None,
    metrics_size: Callable[[], int],
    started: float,
) -> Checkpoints:
    """The checkpoints of a run: when they are due, and what the run adds to them.

    Args:
        metrics_size: returns the bytes of `metrics.jsonl` that belong to the steps done.
        started: when this process began the run, on `time.monotonic`'s clock.
    """

    def describe() -> dict[str, Any]:
        size = metrics_size()
        return {"run_id": folder.id, "metrics_size": size, "files": checksums(folder, size)}

    limit = run.runtime.time_limit_minutes
    return Checkpoints(
        lambda content: write_bytes(folder.checkpoint_file, content),
        describe,
        saved,
        every=run.runtime.checkpoint_every,
        minutes=run.runtime.checkpoint_minutes,
        deadline=None if limit is None else started + 60.0 * limit,
    )


def read_checkpoint(folder: RunFolder) -> Saved | None:
    """The run's checkpoint; None if there is none.

    Raises:
        DamagedFile: the checkpoint, or a file of the run that belongs to it, is not usable.
    """
    path = folder.checkpoint_file
    try:
        for place in (folder.path, path.parent):
            if kind_of(place) != "a folder":
                raise DamagedFile(place, f"it is {kind_of(place)}, not a folder")
        saved = parse_checkpoint(path, read_regular(path, links=False))
        if saved.facts["run_id"] != folder.id:
            raise ValueError("it belongs to another run")
        recorded, size = recorded_checksums(saved), saved.metrics_size
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(path, error) from error
    for name, digest in checksums(folder, size).items():
        if recorded is not None and recorded.get(name) != digest:
            raise DamagedFile(folder.path / name, "it differs from what the checkpoint recorded")
    read_metrics(folder.metrics_file, size)
    return saved


def recorded_checksums(saved: Saved) -> dict[str, str | None] | None:
    """The checksums that the checkpoint recorded; None for a format that has none."""
    if saved.facts["format"] == FORMAT_WITHOUT_CHECKSUM:
        return None
    return saved.facts["files"]


def checksums(folder: RunFolder, metrics_size: int) -> dict[str, str | None]:
    """The SHA-256 of each file that a continued run keeps, by name; None for a missing one."""
    found: dict[str, str | None] = {}
    for path in (folder.metrics_file, folder.init_file, folder.spectra_file):
        try:
            content = read_regular(path, links=False)
        except FileNotFoundError:
            found[path.name] = None
            continue
        except (OSError, ValueError) as error:
            raise DamagedFile(path, error) from error
        if path == folder.metrics_file:
            content = content[:metrics_size]
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def prepare_folder(run: RunConfig, folder: RunFolder, claimed: Claim, main: bool) -> Saved | None:
    """Set the folder back to the run's checkpoint, or empty it; returns the checkpoint."""
    saved = None if run.runtime.rerun else usable_checkpoint(folder)
    if not main:
        return saved
    if saved is None:
        folder.start_over()
    else:
        say(f"  continuing after step {saved.progress.step}")
        kept = (folder.metrics_file, folder.init_file, folder.spectra_file)
        names = [path.name for path in (*kept, folder.environment_file)]
        folder.keep(*names, folder.checkpoint_file.parent.name)
        folder.remove_scratch()
    write_text(folder.config_file, yaml.safe_dump(asdict(run), sort_keys=False))
    if not is_object(folder.environment_file):
        remove(folder.environment_file)
        write_json(folder.environment_file, describe_environment())
    claimed.begin()
    return saved


def usable_checkpoint(folder: RunFolder) -> Saved | None:
    """The run's checkpoint, or None; a line names a damaged file."""
    damage, saved = folder.damage(), None
    try:
        saved = read_checkpoint(folder)
    except DamagedFile as found:
        damage = found
    if damage is not None:
        say_damage(damage, continues=saved is not None)
    return saved


def restarted(folder: RunFolder, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do the work; if it finds a damaged file, do it again without the checkpoint."""
    try:
        return work()
    except DamagedFile as damage:
        say_damage(damage)
        folder.forget_checkpoint()
    return work()


def say_damage(damage: DamagedFile, continues: bool = False) -> None:
    action = "continues from its checkpoint" if continues else "starts over with an empty folder"
    say(f"  {damage}: the run {action}", style="yellow")


def is_object(path: Path) -> bool:
    """Whether the file holds a JSON object."""
    try:
        read_object(path, links=False)
    except (OSError, ValueError):
        return False
    return True


def restore_adapter(saved: Saved | None, model: LoraModel) -> Saved | None:
    """Load the saved adapter into the model.

    Returns:
        None if it belongs to another start: on another machine a calibration may choose other
        ranks. The run then starts over.
    """
    if saved is None:
        return None
    try:
        model.load_state_dict(saved.part("model."))
    except (ValueError, LookupError, TypeError) as error:  # the model has not changed
        say(f"  the checkpoint does not fit, starting over: {error}", style="yellow")
        return None
    return saved


def read_first_start(folder: RunFolder) -> dict[str, Any]:
    """The content of `init.json`: the first start's figures, for a run that continues.

    Raises:
        DamagedFile: it lacks figures that the result needs.
    """
    try:
        init = read_object(folder.init_file, links=False)
        figures = [init["seconds"]["total"], init["seconds"]["calibration"]]
        figures += [init["trainable_parameters"], init["total_parameters"]]
        if any(type(figure) not in (int, float) for figure in figures):
            raise ValueError("a figure in it is not a number")
        missing = {"output_gap", "peak_memory_bytes", "layers"} - init.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DamagedFile(folder.init_file, error) from error
    return init
