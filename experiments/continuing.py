"""Where a run is taken up: at its result, at its checkpoint, or at the beginning."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml

from experiments.checkpoints import Saved, read_checkpoint
from experiments.claims import Claim
from experiments.config import RunConfig
from experiments.console import say
from experiments.environment import describe_environment
from experiments.held_out import outcome
from experiments.runs import RunFolder, write_json, write_text
from lora_init import LoraModel


def already_finished(run: RunConfig, folder: RunFolder) -> dict[str, Any] | None:
    """The result of a run that nothing is left to do for, not even a test."""
    done = None if run.runtime.rerun else folder.finished()
    if done is None or (run.read_test and not done["tested"]):
        return None
    folder.forget_checkpoint()  # of a process that was killed right after its result
    say(f"  finished before, skipped: {folder.path} ({outcome(done)})")
    return done


def prepare_folder(run: RunConfig, folder: RunFolder, claimed: Claim, main: bool) -> Saved | None:
    """The run's checkpoint and its folder as it was then, or an empty folder."""
    saved = None if run.runtime.rerun else read_checkpoint(folder)
    if not main:
        return saved
    if saved is None:
        folder.start_over()
        write_text(folder.path / "config.yaml", yaml.safe_dump(asdict(run), sort_keys=False))
        write_json(folder.path / "environment.json", describe_environment())
    else:
        say(f"  going on after step {saved.progress.step}")
        folder.remove_scratch()
        folder.failed_file.unlink(missing_ok=True)
    claimed.begin()
    return saved


def restore_adapter(saved: Saved | None, model: LoraModel) -> Saved | None:
    """Put the saved adapter into the model; None if it belongs to another start, as after a change
    of machine where a calibration chose other ranks: the run then starts over."""
    if saved is None:
        return None
    try:
        model.load_state_dict(saved.part("model."))
    except ValueError as error:  # the model is as it was
        say(f"  the checkpoint does not fit, starting over: {error}", style="yellow")
        return None
    return saved
