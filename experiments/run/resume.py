"""Where a run is taken up: at its result, at its checkpoint, or at the beginning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from experiments.config.schema import RunConfig
from experiments.console import say
from experiments.errors import DamagedFile
from experiments.run.environment import describe_environment
from experiments.run.files import kind_of, read_object, remove
from experiments.run.folder import RunFolder, write_json, write_text
from experiments.run.held_out import outcome
from experiments.run.lock import Claim
from experiments.training.checkpoint import Saved, read_checkpoint
from lora_init import LoraModel


def already_finished(run: RunConfig, folder: RunFolder) -> dict[str, Any] | None:
    """The result of a run that nothing is left to do for, not even a test."""
    done = None if run.runtime.rerun else folder.finished()
    if done is None or (run.read_test and not done["tested"]):
        return None
    if kind_of(folder.path) == "a folder":
        folder.forget_checkpoint()  # of a process that was killed right after its result
    say(f"  finished before, skipped: {folder.path} ({outcome(done)})")
    return done


def prepare_folder(run: RunConfig, folder: RunFolder, claimed: Claim, main: bool) -> Saved | None:
    """The run's checkpoint and its folder as it was then, or an empty folder."""
    saved = None if run.runtime.rerun else usable_checkpoint(folder)
    if not main:
        return saved
    if saved is None:
        folder.start_over()
    else:
        say(f"  going on after step {saved.progress.step}")
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
    """The run's checkpoint, or None; a line says which file is damaged, if one is."""
    damage, saved = folder.damage(), None
    try:
        saved = read_checkpoint(folder)
    except DamagedFile as found:
        damage = found
    if damage is not None:
        tell_damage(damage, goes_on=saved is not None)
    return saved


def restarted(folder: RunFolder, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do the work. Where it finds a damaged file, before its first step, do it from the start."""
    try:
        return work()
    except DamagedFile as damage:
        tell_damage(damage)
        folder.forget_checkpoint()
    return work()


def tell_damage(damage: DamagedFile, goes_on: bool = False) -> None:
    what = "goes on from its checkpoint" if goes_on else "starts over, and its folder is emptied"
    say(f"  {damage}: the run {what}", style="yellow")


def is_object(path: Path) -> bool:
    """Whether the file holds a JSON object."""
    try:
        read_object(path, links=False)
    except (OSError, ValueError):
        return False
    return True


def restore_adapter(saved: Saved | None, model: LoraModel) -> Saved | None:
    """Put the saved adapter into the model; None if it belongs to another start, as after a change
    of machine where a calibration chose other ranks: the run then starts over."""
    if saved is None:
        return None
    try:
        model.load_state_dict(saved.part("model."))
    except (ValueError, LookupError, TypeError) as error:  # the model is as it was
        say(f"  the checkpoint does not fit, starting over: {error}", style="yellow")
        return None
    return saved


def read_first_start(folder: RunFolder) -> dict[str, Any]:
    """What `init.json` holds: the first start's figures, where a run goes on.

    Raises:
        DamagedFile: the figures that a result takes from it are not there.
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
