"""Whatever ends a run, its folder says why, and what was finished stays as it is."""

from __future__ import annotations

import json
import os
import pickle
import resource

import pytest
import torch
from safetensors.torch import save_file

from experiments.errors import ConfigurationError, RunFailed
from experiments.run import execute as execution
from experiments.run.execute import execute
from experiments.run.failures import reason_of
from experiments.run.files import write_bytes
from experiments.run.folder import identify
from experiments.run.metrics import MetricsFile
from experiments.run.start import naming_the_method
from experiments.training import loop as training

pytestmark = pytest.mark.sampled(3)


def test_a_refusal_names_the_method_once(configured):
    for text in ("eva: no layer's inputs vary", "no layer's inputs vary"):
        run = configured("init=eva")
        once = pytest.raises(ConfigurationError, match="^init=eva: no layer")
        with once, naming_the_method(run):
            raise ValueError(text)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (OSError(28, "No space left on device"), "disk full"),
        (OSError(122, "Disk quota exceeded"), "disk full"),
        (OSError(13, "Permission denied"), "error"),
        (RunFailed("the loss is nan", reason="diverged"), "diverged"),
        (ConfigurationError("lora.r=0"), "configuration"),
        (ZeroDivisionError("division by zero"), "error"),
    ],
)
def test_reasons(error, reason):
    assert reason_of(error) == reason
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = error
    if not isinstance(error, ConfigurationError):
        assert reason_of(wrapped) == reason


def test_a_failure_travels_between_processes():
    again = pickle.loads(pickle.dumps(RunFailed("it ended", reason="time limit", step=3)))
    assert (str(again), again.reason, again.facts) == ("it ended", "time limit", {"step": 3})


def failure(folder) -> dict:
    found = json.loads(folder.failed_file.read_text())
    assert found["run_id"] == folder.id
    return found


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("no room"), "out of memory"), (KeyError("layer"), "error")],
)
def test_an_error_is_marked_and_the_next_ask_goes_on(configured, tiny, monkeypatch, error, reason):
    run = configured(*tiny, "runtime.checkpoint_every=1", "training.validate_at_end=false")
    folder = identify(run)
    with monkeypatch.context() as patch:

        def fail(*arguments):
            raise error

        patch.setattr(execution, "evaluate", fail)
        with pytest.raises(type(error)):
            execute(run)
    found = failure(folder)
    assert (found["reason"], found["error"]) == (reason, type(error).__name__)
    assert "in fail" in "\n".join(found["traceback"])
    assert not folder.running_file.exists()
    monkeypatch.setattr(training, "backward", None)  # all steps were done
    execute(run)
    assert not folder.failed_file.exists()


def test_what_has_diverged_is_not_repeated(configured, tiny, monkeypatch):
    settings = (*tiny, "training.learning_rate=1e30", "training.warmup=0", "training.steps=9",
                "training.max_grad_norm=null", "runtime.checkpoint_every=1")  # fmt: skip
    run = configured(*settings)
    with pytest.raises(RunFailed, match="diverged"):
        execute(run)
    first = identify(run).failed_file.read_bytes()
    assert failure(identify(run))["reason"] == "diverged"
    with monkeypatch.context() as patch:
        patch.setattr(execution, "load_model", None)  # nothing is loaded
        with pytest.raises(RunFailed, match="runtime.rerun=true") as error:
            execute(run)
    assert error.value.reason == "diverged"
    assert identify(run).failed_file.read_bytes() == first
    with pytest.raises(RunFailed, match="diverged; lower"):
        execute(configured(*settings, "runtime.rerun=true"))


@pytest.mark.parametrize("name", ["training.safetensors", "result.json", "metrics.jsonl"])
def test_a_full_disk_harms_nothing_finished(configured, tiny, monkeypatch, name):
    """The disk is full from one write on: the finished run and the last checkpoint stay."""
    finished = configured(*tiny, "init=olora")
    execute(finished)
    before = {path: path.read_bytes() for path in identify(finished).path.glob("*.*")}
    run = configured(*tiny, "runtime.checkpoint_every=1")
    folder = identify(run)
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        if name == "metrics.jsonl":
            append = MetricsFile.append

            def second_line(self, row):
                if row["step"] == 2:
                    self.file.write('{"step": 2, "spl')
                    self.file.flush()
                    raise full
                append(self, row)

            patch.setattr(MetricsFile, "append", second_line)
        else:
            replace, writes = os.replace, []

            def no_room(scratch, path):
                writes.append(path)
                if path.name == name and (name == "result.json" or len(writes) > 6):
                    raise full
                replace(scratch, path)

            patch.setattr(os, "replace", no_room)
        with pytest.raises(OSError, match="No space left"):
            execute(run)
    assert failure(folder)["reason"] == "disk full"
    assert folder.finished() is None
    assert folder.checkpoint_file.exists()
    assert [p for p in folder.path.rglob(".*")] == []
    assert {path: path.read_bytes() for path in identify(finished).path.glob("*.*")} == before
    execute(run)
    assert folder.finished()


def test_a_real_write_that_finds_no_room(tmp_path):
    """The operating system's own refusal: the old file stays, the half-written one is gone."""
    path = tmp_path / "training.safetensors"
    write_bytes(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_bytes(path, bytes(8192))
        with pytest.raises(Exception, match="os error") as wrapped:
            save_file({"weight": torch.zeros(8192)}, tmp_path / "adapter.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert reason_of(error.value) == reason_of(wrapped.value) == "disk full"
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.glob(".*")] == []
