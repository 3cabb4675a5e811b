"""The tracker mirrors the local files and is closed whatever happens."""

from __future__ import annotations

import functools
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.config.records import TrackingConfig
from experiments.run.execute import execute
from experiments.run.tracking import mirror, track


def open_tracker(settings, folder):
    return track(
        settings, run_id="abc", name="n", group="sweep", job_type="pissa", config={}, folder=folder
    )


def test_none_does_nothing(tmp_path):
    with open_tracker(TrackingConfig(), tmp_path) as log:
        log({"step": 1, "split": "train", "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


class Recorder:
    """Stands in for the package wandb."""

    def __init__(self):
        self.started, self.rows, self.codes = {}, [], []
        self.run = SimpleNamespace(
            log=lambda row, step: self.rows.append((row, step)),
            finish=lambda exit_code: self.codes.append(exit_code),
        )

    def init(self, **settings):
        self.started = settings
        return self.run

    def Settings(self, **settings):
        return settings


def test_wandb_is_grouped_and_closed(monkeypatch, tmp_path):
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with open_tracker(TrackingConfig(backend="wandb"), tmp_path) as log:
        log({"step": 3, "split": "train", "loss": 1.0})
    assert wandb.started["group"] == "sweep"
    assert wandb.started["job_type"] == "pissa"
    assert wandb.started["mode"] == "offline"
    assert wandb.rows == [({"train/loss": 1.0}, 3)]
    assert wandb.codes == [0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_wandb_is_closed_after_a_failure(monkeypatch, tmp_path, error):
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(error), open_tracker(TrackingConfig(backend="wandb"), tmp_path):
        raise error
    assert wandb.codes == [1]


class Broken(Recorder):
    """The package wandb with one call that fails, and that draws random numbers in each."""

    def __init__(self, call: str, error: BaseException):
        super().__init__()
        self.call, self.error, self.calls = call, error, []
        methods = ("log", "finish")
        self.run = SimpleNamespace(**{m: functools.partial(self.do, m) for m in methods})

    def do(self, call, *arguments, **settings):
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        self.calls.append(call)
        if call == self.call:
            raise self.error
        return self.run

    def init(self, **settings):
        settings["config"]["run_id"] = "changed"
        return self.do("init")


ERRORS = (
    RuntimeError("no\nserver"), TypeError("x"), TimeoutError(), OSError(28, "full"), SystemExit(1)
)  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", ["Settings", "init", "log", "finish"])
def test_a_failing_wandb_is_one_warning(monkeypatch, tmp_path, capsys, call, error):
    wandb = Broken(call, error)
    if call == "Settings":
        monkeypatch.setattr(Broken, "Settings", lambda self, **more: self.do("Settings"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    before = random.getstate(), torch.get_rng_state()
    with open_tracker(TrackingConfig(backend="wandb"), tmp_path) as log:
        for step in range(3):
            log({"step": step, "split": "train", "loss": 1.0})
    told = capsys.readouterr().out
    assert told.count("tracking=wandb") == 1
    assert type(error).__name__ in told
    assert len(told.splitlines()) == 1
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert wandb.calls.count("log") == {"log": 1, "finish": 3}.get(call, 0)
    assert wandb.calls.count("finish") == (call in ("log", "finish")), "an open run is closed"


@pytest.mark.exhaustive
def test_a_run_is_the_same_whatever_wandb_does(configured, tiny, monkeypatch, tmp_path, capsys):
    """Without the package, and with one that fails in the middle."""
    unmeasured = ("measures.forgetting_texts=0", "measures.intruder_layers=0",
                  "measures.spectra_layers=0", "model.dropout=0.1")  # fmt: skip
    expected = execute(configured(*tiny, *unmeasured, f"paths.outputs={tmp_path}/none"))
    for name, wandb in (("missing", None), ("broken", Broken("log", RuntimeError("gone")))):
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        outputs = f"paths.outputs={tmp_path}/{name}"
        result = execute(configured(*tiny, *unmeasured, "tracking=wandb", outputs))
        assert result["test"] == expected["test"]
        assert result["first_step_gradient_norms"] == expected["first_step_gradient_norms"]
        assert capsys.readouterr().out.count("tracking=wandb: ") == 1


@pytest.mark.parametrize("length", [1, 64, 65, 128, 129, 5000])
def test_names_fit_into_wandbs_limits(monkeypatch, tmp_path, length):
    """wandb's server refuses longer ones when an offline run is synced."""
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    limits = {"name": 128, "group": 128, "job_type": 64}
    sent = []
    for last in "xy":
        given = dict.fromkeys(limits, "é" * (length - 1) + last)
        settings = TrackingConfig(backend="wandb")
        with track(settings, run_id="abc", config={}, folder=tmp_path, **given):
            pass
        sent.append({key: wandb.started[key] for key in given})
        for key, most in limits.items():
            assert len(sent[-1][key]) == min(length, most)
            assert sent[-1][key] == given[key] or sent[-1][key].startswith("é" * (most - 9) + "-")
    assert all(sent[0][key] != sent[1][key] for key in limits), "different names stay different"


def test_mirror():
    row = {"step": 2, "split": "validation", "loss": 0.5, "accuracy": 1.0}
    assert mirror(row) == ({"validation/loss": 0.5, "validation/accuracy": 1.0}, 2)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_an_offline_run_of_the_real_wandb(configured, tiny, tmp_path, capfd):
    import wandb

    execute(configured(*tiny, "tracking=wandb", "sweep=demo"))
    assert wandb.run is None  # closed: the next run of this process gets its own
    folders = list((tmp_path / "outputs" / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    assert list(folders[0].glob("*.wandb"))
    assert "error" not in capfd.readouterr().err.lower()
