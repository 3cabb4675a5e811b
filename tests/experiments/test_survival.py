"""Sweeps of real processes: killed in the middle, run twice at once, with runs that fail."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from processes import start

from experiments import train
from experiments.run.execute import execute
from experiments.run.folder import identify
from experiments.run.lock import acquire, release
from experiments.sweep.status.survey import survey


def losses(folder) -> list[tuple]:
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return [(line["split"], line["step"], line.get("loss")) for line in lines]


def manifest(outputs: Path) -> dict:
    return json.loads((outputs / "sweeps" / "default" / "manifest.json").read_text())


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_sweep_killed_and_taken_up_by_two_at_once(
    command, configured, tiny, tmp_path, monkeypatch
):
    """kill -9 in mid-training; then the same command twice: each run once, the same losses."""
    settings = [*tiny, "training.steps=120", "training.validate_every=50", "model.dropout=0.1",
                "runtime.checkpoint_every=20", "measures.forgetting_texts=0",
                "measures.intruder_layers=0", "measures.spectra_layers=0"]  # fmt: skip
    sweep = ["-m", *settings, "init=kaiming,pissa,olora"]
    runs = [configured(*settings, f"init={m}") for m in ("kaiming", "pissa", "olora")]
    folders = [identify(run) for run in runs]

    monkeypatch.setenv("COLUMNS", "200")
    killed = start(train.main, *sweep, cwd=tmp_path, told=tmp_path / "killed")
    lines = 0
    while lines < 25:  # of the second run, which is past its first checkpoint
        assert killed.running(), killed.text
        time.sleep(0.01)
        if folders[1].metrics_file.exists():
            lines = len(folders[1].metrics_file.read_text().splitlines())
    killed.kill()
    assert folders[0].finished()
    assert not folders[1].finished()
    assert [run["status"] for run in manifest(tmp_path / "outputs")["runs"]] == [
        "finished", "started",
    ]  # fmt: skip
    found = survey(tmp_path / "outputs" / "sweeps" / "default")
    assert [line.state for line in found.lines] == ["finished", "died", "missing"]
    before = folders[0].result_file.read_bytes()

    monkeypatch.chdir(tmp_path)
    other = start(train.main, *sweep, cwd=tmp_path, told=tmp_path / "other")
    status, printed, told = command(*sweep)
    assert status == 0, told
    assert other.wait(240) == 0, other.text
    printed += other.text
    assert printed.count("training ") == 2  # the line at the end of a run, whoever did it
    assert printed.count("continuing after step") == 1
    assert folders[0].result_file.read_bytes() == before
    assert manifest(tmp_path / "outputs")["status"] == "finished"
    assert len(manifest(tmp_path / "outputs")["runs"]) == 3

    alone = configured(*settings, "init=pissa", f"paths.outputs={tmp_path}/alone")
    execute(alone)
    assert losses(folders[1]) == losses(identify(alone))


@pytest.mark.exhaustive
def test_a_failing_run_ends_neither_sweep_nor_silence(command, tiny, tmp_path):
    rates = "training.learning_rate=1e30,1e-3"
    status, printed, told = command(
        "-m", *tiny, rates, "training.max_grad_norm=null", "training.warmup=0",
        "training.steps=9", "init=kaiming,olora",
    )  # fmt: skip
    assert status == 1
    assert told.startswith("2 of 4 runs failed: kaiming-tiny-table-s0-")
    assert told.count("(diverged)") == 2
    assert printed.count("failed (diverged): the loss is") == 2
    listed = manifest(tmp_path / "outputs")
    assert [r["status"] for r in listed["runs"]] == ["failed", "failed", "finished", "finished"]
    assert listed["status"] == "incomplete"


def test_a_single_run_that_is_taken_says_so(command, configured, tiny):
    folder = identify(configured(*tiny))
    held = acquire(folder, wait=False)
    status, _, told = command(*tiny)
    release(folder, held)
    assert status == 1
    assert "another process works on this run" in told


@pytest.mark.exhaustive
def test_two_different_sweeps_of_one_name_share_a_list(command, configured, tiny, tmp_path):
    """While a run of one is worked on, the other adds its runs; alone, it starts a new list."""
    assert command("-m", *tiny, "init=kaiming,pissa")[0] == 0
    at_work = identify(configured(*tiny, "init=pissa"))
    held = acquire(at_work, wait=False)
    result = at_work.result_file.read_bytes()
    at_work.result_file.unlink()
    assert command("-m", *tiny, "init=gaussian")[0] == 0
    listed = manifest(tmp_path / "outputs")
    assert (listed["total"], listed["status"]) == (3, "finished")
    assert [run["overrides"][-1] for run in listed["runs"]] == [
        "init=kaiming", "init=pissa", "init=gaussian",
    ]  # fmt: skip
    at_work.result_file.write_bytes(result)
    release(at_work, held)
    assert command("-m", *tiny, "init=olora")[0] == 0
    listed = manifest(tmp_path / "outputs")
    assert (listed["total"], len(listed["runs"]), listed["status"]) == (1, 1, "finished")
