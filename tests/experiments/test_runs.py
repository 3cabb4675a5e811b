"""Identity, and files that are there completely or not at all."""

from __future__ import annotations

import json

import pytest

from experiments.run.environment import describe_environment
from experiments.run.files import write_json
from experiments.run.folder import identify
from experiments.run.metrics import MetricsFile

RESULT = {"status": "finished", "metric": "accuracy", "score": 0.5}


def test_the_id_ignores_what_cannot_change_the_outcome(configured, tmp_path):
    plain = identify(configured("init=pissa"))
    for override in (
        f"paths.outputs={tmp_path}", "tracking=wandb", "sweep=other", "runtime.threads=1",
        "runtime.rerun=true", "measures.update_every=1", "runtime.micro_batch_size=2",
        "runtime.gradient_checkpointing=true", "runtime.calibration_gib=1",
    ):  # fmt: skip
        assert identify(configured("init=pissa", override)).id == plain.id
    assert identify(configured("init=pissa", "seed=0")).id == plain.id


@pytest.mark.parametrize(
    "override",
    ["seed=1", "seeds.head=1", "init=olora", "init.niter=4", "training.steps=3", "lora.r=4",
     "model.dropout=null", "data.test_limit=9", "calibration.samples=8",
     "training.lora_plus_ratio=2", "budget.tokens=50", "model.dtype=bfloat16"],
)  # fmt: skip
def test_the_id_depends_on_everything_else(configured, override):
    assert identify(configured("init=pissa", override)).id != identify(configured("init=pissa")).id


def test_settings_that_came_later_leave_older_runs_as_they_were(configured):
    """The ids that these configurations had before there were such settings."""
    known = {
        ("init=pissa",): "de35604854",
        ("experiment=arithmetic",): "a1fa0f6e6f",
        ("control=rslora", "model.dtype=float32"): "03ac340b34",
        ("model=local", "model.path=x", "init=corda", "calibration.path=null"): "6311b6c239",
    }
    assert {overrides: identify(configured(*overrides)).id for overrides in known} == known


def test_other_calibration_texts_are_another_run(configured, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "who?"}\n')
    overrides = ("init=corda", f"calibration.path={path}")
    before = identify(configured(*overrides)).id
    assert before != identify(configured("init=corda")).id
    path.write_text('{"question": "where?"}\n')
    assert identify(configured(*overrides)).id != before


def test_the_folder_is_readable(configured, tmp_path):
    folder = identify(configured("init=pissa", "seed=3", f"paths.outputs={tmp_path}"))
    assert folder.path.parent == tmp_path / "runs"
    assert folder.path.name == f"pissa-minilm-rotten_tomatoes-s3-{folder.id}"
    assert len(folder.id) == 10


def test_an_edited_table_is_another_run(configured, tmp_path):
    path = tmp_path / "t.csv"
    overrides = ("data=table", f"data.path={path}", "data.text_column=a", "data.label_column=b")
    path.write_text("a,b\nx,y\n")
    before = identify(configured(*overrides)).id
    assert identify(configured(*overrides)).id == before
    path.write_text("a,b\nx,z\n")
    assert identify(configured(*overrides)).id != before


def test_only_a_complete_result_counts(configured, tmp_path):
    folder = identify(configured(f"paths.outputs={tmp_path}"))
    assert folder.finished() is None
    folder.start_over()
    for content in ("", "{", "[]", json.dumps({**RESULT, "run_id": "another"}),
                    json.dumps({**RESULT, "run_id": folder.id, "status": "failed"})):  # fmt: skip
        folder.result_file.write_text(content)
        assert folder.finished() is None
    write_json(folder.result_file, {**RESULT, "run_id": folder.id})
    assert folder.finished()["score"] == 0.5
    folder.start_over()
    assert list(folder.path.iterdir()) == []


def test_metrics_are_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.append({"step": 1, "loss": 0.5})
        assert json.loads(path.read_text()) == {"step": 1, "loss": 0.5}


def test_the_environment_is_json():
    facts = json.loads(json.dumps(describe_environment()))
    assert facts["packages"]["torch"].startswith("2.")
    assert set(facts) >= {"python", "git_commit", "git_dirty", "cpu", "gpu", "threads"}
