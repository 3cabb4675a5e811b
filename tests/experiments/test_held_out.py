"""The test set is read when asked for, once, and a run that waited for it is not trained again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from products import chosen

from experiments.errors import ConfigurationError
from experiments.run import execute as execution
from experiments.run import held_out
from experiments.run.execute import execute
from experiments.run.folder import identify

# What is written and read again depends on the kind of base (kept, edited, replaced) and on whether
# data decides, also about the ranks; not on the method.
KINDS = ["kaiming", "pissa", "corda", "loftq", "eva"]

# What the end of a run measures besides is not looked at here.
UNMEASURED = ["measures.forgetting_texts=0", "measures.intruder_layers=0",
              "measures.spectra_layers=0"]  # fmt: skip


def rows(folder, split):
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


@pytest.mark.parametrize("method", chosen(KINDS, "pissa", "eva"))
def test_a_late_test_gives_the_scores_of_an_early_one(configured, tiny, tmp_path, method):
    overrides = [*tiny, *UNMEASURED, f"init={method}"]
    at_once = execute(configured(*overrides, f"paths.outputs={tmp_path}/at-once"))
    run = configured(*overrides, "read_test=false")
    folder = identify(run)
    waiting = execute(run)
    assert (waiting["tested"], waiting["score"], waiting["test"]) == (False, None, None)
    assert not rows(folder, "test")
    assert not (folder.path / "predictions.npz").exists()
    assert waiting["validation_score"] == at_once["validation_score"]

    tested = execute(configured(*overrides))
    assert tested["run_id"] == at_once["run_id"] == waiting["run_id"]
    assert tested["finished_at"] == waiting["finished_at"], "not trained again"
    assert tested["test"] == pytest.approx(at_once["test"], abs=1e-5)
    assert json.loads(folder.result_file.read_text()) == json.loads(json.dumps(tested))
    assert [row["loss"] for row in rows(folder, "test")] == [tested["loss_test"]]
    with np.load(folder.path / "predictions.npz") as saved:
        assert saved["correct"].mean() == pytest.approx(tested["score"])


def test_a_causal_model_is_tested_later(configured, tiny_causal, tmp_path):
    at_once = execute(configured(*tiny_causal, "init=pissa", f"paths.outputs={tmp_path}/at-once"))
    execute(configured(*tiny_causal, "init=pissa", "read_test=false"))
    tested = execute(configured(*tiny_causal, "init=pissa"))
    assert tested["test"] == pytest.approx(at_once["test"], abs=1e-5)


def test_the_test_set_is_read_once(configured, tiny, monkeypatch, capsys):
    execute(configured(*tiny, "read_test=false"))
    again = execute(configured(*tiny, "read_test=false"))
    assert again["score"] is None
    assert "test set unread" in capsys.readouterr().out
    tested = execute(configured(*tiny))
    for module in (execution, held_out):
        monkeypatch.setattr(module, "load_data", None)  # nothing may be loaded
    assert execute(configured(*tiny)) == tested
    assert execute(configured(*tiny, "read_test=false")) == tested


def test_a_killed_test_leaves_the_trained_run(configured, tiny, monkeypatch):
    run = configured(*tiny)
    waiting = execute(configured(*tiny, "read_test=false"))

    def killed(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(held_out, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(run)
    assert identify(run).finished() == json.loads(json.dumps(waiting))
    assert execute(run)["tested"]


def test_the_validation_score_is_the_last_models(configured, tiny):
    run = configured(*tiny, "training.validate_every=2", "training.validate_at_end=false")
    result = execute(run)
    assert [row["step"] for row in rows(identify(run), "validation")] == [2]
    assert result["validation_score"] is None
    run = configured(*tiny, "training.validate_every=2")
    result = execute(run)
    validated = rows(identify(run), "validation")
    assert [row["step"] for row in validated] == [2, 3]
    assert result["validation_score"] == result["validation"]["accuracy"]
    assert result["validation"]["loss"] == validated[-1]["loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.validate_at_end=false"], "training.validate_at_end=false leaves nothing"),
        (["data.validation_limit=0"], "an empty validation split leaves nothing"),
        (["training.save_adapter=false"], "training.save_adapter=true"),
    ],
)
def test_a_run_that_nothing_could_judge_is_refused(configured, tiny, overrides, message):
    run = configured(*tiny, "read_test=false", *overrides)
    with pytest.raises(ConfigurationError, match=message):
        execute(run)
    assert not identify(run).path.exists()
