"""A run that was interrupted continues with the losses of one that was not, to the last bit."""

from __future__ import annotations

import contextlib
import json
import random
import re

import pytest
import torch
from products import chosen
from safetensors.torch import load_file

from experiments.errors import RunFailed
from experiments.run import metrics as recording
from experiments.run.execute import execute
from experiments.run.folder import identify
from experiments.run.resume import read_checkpoint
from experiments.training import checkpoint as module
from experiments.training import loop as training

METHODS = ("pissa", "eva", "loftq")  # base edited, ranks redistributed, base replaced
LENGTH = ("training.steps=9", "training.validate_every=3", "training.schedule=cosine")
# What is measured after the last step is not looked at here.
UNMEASURED = ("measures.forgetting_texts=0", "measures.intruder_layers=0",
              "measures.spectra_layers=0")  # fmt: skip
DROPOUT = ("model.dropout=0.2", "lora.lora_dropout=0.1")


def rows(folder) -> list[dict]:
    """The lines of metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture
def broken_off(monkeypatch):
    """`broken_off(run, 5)` does the run until a Ctrl-C in step 5's backward pass."""

    def do(run, at: int) -> None:
        steps = iter(range(1, at))
        backward = training.backward

        def interrupted(*arguments):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return backward(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(training, "backward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                execute(run)

    return do


@pytest.mark.filterwarnings("ignore:lora_dropout")
@pytest.mark.parametrize("method", chosen(METHODS, "eva"))
def test_a_continued_run_has_the_same_losses(configured, tiny, broken_off, tmp_path, method):
    """Broken off after a validation, in the middle of the schedule, with two kinds of dropout."""
    settings = [*tiny, *UNMEASURED, *LENGTH, *DROPOUT, f"init={method}", "runtime.cache=false"]
    whole = configured(*settings, f"paths.outputs={tmp_path}/whole")
    expected = execute(whole)
    run = configured(*settings, "runtime.checkpoint_every=2")
    folder = identify(run)
    broken_off(run, 6)  # after the checkpoint of step 4 and one step more
    assert rows(folder)[-1]["step"] == 5
    first_start = (folder.path / "init.json").read_bytes()
    random.seed(5)
    torch.rand(7)
    result = execute(run)
    assert rows(folder) == rows(identify(whole))
    for same in ("test", "first_step_gradient_norms", "train_tokens", "steps"):
        assert result[same] == expected[same]
    assert (folder.path / "init.json").read_bytes() == first_start
    assert not folder.checkpoint_file.exists()
    assert not folder.running_file.exists()
    for path in (folder.path / "adapter").glob("*.safetensors"):
        mine, other = load_file(path), load_file(identify(whole).path / "adapter" / path.name)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.exhaustive
def test_a_run_may_be_interrupted_several_times(configured, tiny_causal, broken_off, tmp_path):
    settings = [*tiny_causal, *UNMEASURED, *LENGTH, "init=olora", "model.dropout=0.1"]
    whole = configured(*settings, f"paths.outputs={tmp_path}/whole")
    execute(whole)
    run = configured(*settings, "runtime.checkpoint_every=1")
    for _ in range(3):
        broken_off(run, 3)
    execute(run)
    assert rows(identify(run)) == rows(identify(whole))


def test_a_run_killed_after_its_last_step_only_tests(configured, tiny, monkeypatch):
    run = configured(*tiny, *UNMEASURED, "runtime.checkpoint_every=3")
    folder = identify(run)
    with monkeypatch.context() as patch:
        patch.setattr("experiments.run.execute.describe_result", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(run)
    splits = ["train"] * 3 + ["update", "validation", "test"]
    assert [row["split"] for row in rows(folder)] == splits
    with monkeypatch.context() as patch:
        patch.setattr(training, "backward", None)  # no step is left to do
        execute(run)
    assert [row["split"] for row in rows(folder)] == splits


def test_the_tracker_of_a_continued_run_gets_all_rows(configured, tiny, broken_off, monkeypatch):
    """Each process opens its own tracker, and only the last one sees the end."""
    told = []

    @contextlib.contextmanager
    def track(settings, **facts):
        told.append([])
        yield lambda row: told[-1].append((row["split"], row["step"]))

    monkeypatch.setattr(recording, "track", track)
    run = configured(*tiny, *UNMEASURED, "runtime.checkpoint_every=1")
    broken_off(run, 3)
    execute(run)
    assert told[0] == [("train", 1), ("train", 2)]
    assert told[1][:3] == [("train", 1), ("train", 2), ("train", 3)]
    assert told[1] == [(row["split"], row["step"]) for row in rows(identify(run))]


def test_the_same_command_continues_after_a_time_limit(configured, tiny, tmp_path):
    whole = configured(*tiny, *UNMEASURED, f"paths.outputs={tmp_path}/whole")
    execute(whole)
    run = configured(*tiny, *UNMEASURED, "runtime.time_limit_minutes=1e-6")
    folder = identify(run)
    assert folder.id == identify(whole).id
    for step in (1, 2):
        with pytest.raises(RunFailed, match="time limit"):
            execute(run)
        failure = json.loads(folder.failed_file.read_text())
        assert (failure["reason"], failure["step"]) == ("time limit", step)
        assert read_checkpoint(folder).progress.step == step
    execute(run)  # whose last step needs no time after it
    assert rows(folder) == rows(identify(whole))
    assert not folder.failed_file.exists()


def test_checkpoints_come_by_the_clock(configured, tiny, monkeypatch):
    """Half a minute a step, and a checkpoint each minute: after every second step."""
    run = configured(*tiny, *UNMEASURED, "training.steps=7", "runtime.checkpoint_minutes=1")
    written = []

    class Clock:
        time = 0.0

        def monotonic(self):
            return self.time

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    write = module.Checkpoints.write
    monkeypatch.setattr(
        module.Checkpoints, "write",
        lambda self, *more: (written.append(self.progress.step), write(self, *more)),
    )  # fmt: skip
    done = module.Checkpoints.step_done

    def slow(self, *arguments, **more):
        clock.time += 30.0
        done(self, *arguments, **more)

    monkeypatch.setattr(module.Checkpoints, "step_done", slow)
    execute(run)
    assert written == [2, 4, 6]


@pytest.mark.parametrize("damage", chosen(["other run", "other ranks"], "other run"))
def test_a_checkpoint_of_another_run_is_not_continued(configured, tiny, broken_off, damage):
    run = configured(*tiny, *UNMEASURED, "init=pissa", "runtime.checkpoint_every=1")
    folder = identify(run)
    broken_off(run, 3)
    path = folder.checkpoint_file
    if damage == "other run":
        other = configured(*tiny, *UNMEASURED, "init=pissa", "seed=1", "runtime.checkpoint_every=1")
        broken_off(other, 3)
        path.write_bytes(identify(other).checkpoint_file.read_bytes())
    else:
        other = configured(
            *tiny, *UNMEASURED, "init=pissa", "lora.r=2", "runtime.checkpoint_every=1"
        )
        broken_off(other, 3)
        found = identify(other)
        for name in ("metrics.jsonl", "init.json", "spectra.json"):
            (folder.path / name).write_bytes((found.path / name).read_bytes())
        content = found.checkpoint_file.read_bytes().replace(found.id.encode(), folder.id.encode())
        seal = rb'"sha256":"[0-9a-f]{64}"'
        path.write_bytes(module.sealed(re.sub(seal, module.EMPTY_SEAL, content, count=1)))
        assert read_checkpoint(folder) is not None
    execute(run)
    assert [row["step"] for row in rows(folder) if row["split"] == "train"] == [1, 2, 3]


def test_nothing_in_a_checkpoint_is_pickled(configured, tiny, broken_off):
    run = configured(*tiny, *UNMEASURED, "runtime.checkpoint_every=1")
    broken_off(run, 2)
    saved = read_checkpoint(identify(run))
    assert {type(value) for value in saved.tensors.values()} == {torch.Tensor}
    assert saved.progress.step == 1
    names = [path.name for path in identify(run).checkpoint_file.parent.iterdir()]
    assert names == ["training.safetensors"]
