"""The tracker mirrors the local files and is closed whatever happens."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from experiments.errors import ConfigurationError
from experiments.execution import execute
from experiments.tracking import TrackingConfig, mirror, track


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


def test_a_missing_wandb_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(ConfigurationError, match="pip install wandb"),
        open_tracker(TrackingConfig(backend="wandb"), tmp_path),
    ):
        pass


def test_mirror():
    row = {"step": 2, "split": "validation", "loss": 0.5, "accuracy": 1.0}
    assert mirror(row) == ({"validation/loss": 0.5, "validation/accuracy": 1.0}, 2)


@pytest.mark.slow
def test_an_offline_run_of_the_real_wandb(configured, tiny, tmp_path, capfd):
    import wandb

    execute(configured(*tiny, "tracking=wandb", "sweep=demo"))
    assert wandb.run is None  # closed: the next run of this process gets its own
    folders = list((tmp_path / "outputs" / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    assert list(folders[0].glob("*.wandb"))
    assert "error" not in capfd.readouterr().err.lower()
