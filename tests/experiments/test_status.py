"""The status of a sweep, from files as its runs leave them."""

from __future__ import annotations

import json
import time

import pytest

from experiments import status as command
from experiments.run import lock as claims
from experiments.run.files import write_json
from experiments.run.folder import RunFolder
from experiments.run.lock import acquire, release
from experiments.sweep.status.page import readable
from experiments.sweep.status.survey import Line, find_sweep, seconds_left, survey

RUNS = ("finished", "running", "diverged", "died", "refused")


def now(before: float = 0.0) -> str:
    return time.strftime(claims.CLOCK, time.gmtime(time.time() - before))


@pytest.fixture
def sweep(tmp_path):
    """One run of each kind, and one that was planned and not begun; the lock of one is held."""
    folders = {kind: RunFolder(f"id-{kind}", tmp_path / "runs" / f"pissa-m-d-s0-{kind}")
               for kind in RUNS}  # fmt: skip
    held = acquire(folders["running"], wait=False)
    result = {"run_id": "id-finished", "status": "finished", "steps": 100, "init_seconds": 20.0,
              "train_seconds": 80.0}  # fmt: skip
    write_json(folders["finished"].result_file, result)
    beat = {"host": "here", "pid": 7, "started": now(), "steps": 100}
    write_json(folders["running"].running_file, {**beat, "step": 25, "updated": now(3)})
    write_json(folders["died"].running_file, {**beat, "step": 50, "updated": now(9000)})
    failure = {"run_id": "id-diverged", "reason": "diverged", "message": "the loss is nan"}
    write_json(folders["diverged"].failed_file, failure)
    jobs = [
        {
            "job": number,
            "overrides": [f"init=pissa{number}"],
            "run_id": folders[kind].id,
            "folder": f"elsewhere/runs/{folders[kind].path.name}",  # moved since
            "status": "failed" if kind == "refused" else "started",
        }
        for number, kind in enumerate(RUNS)
    ]
    folder = tmp_path / "sweeps" / "mine"
    for job in jobs:
        write_json(folder / "jobs" / f"{job['job']}.json", job)
    planned = [*(job["overrides"] for job in jobs), ["init=pissa", "seed=9"]]
    write_json(folder / "sweep.json", {"sweep": "mine", "total": 6, "planned": planned})
    yield folder
    release(folders["running"], held)


def test_every_state_is_seen(sweep):
    found = survey(sweep)
    states = [line.state for line in found.lines]
    assert states == ["finished", "running", "failed", "died", "failed", "missing"]
    assert [line.reason for line in found.lines] == [
        None, None, "diverged", None, "configuration", None,
    ]  # fmt: skip
    running = found.lines[1]
    assert (running.step, running.steps, running.worker) == (25, 100, "here:7")
    assert 3 <= running.age < 60
    assert found.lines[5].name == "init=pissa seed=9"
    # Methods alike take alike: 75 % of the running one, all of the dead, refused and missing ones.
    assert seconds_left(found.lines) == pytest.approx(100.0 * (0.75 + 0.5 + 1 + 1))


def test_it_is_printed(sweep, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert command.main([str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert "mine: 6 runs" in printed
    assert "1 failed (diverged)" in printed
    assert "about 5 min 25 s left" in printed
    assert "25/100" in printed
    assert command.main([str(sweep), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counts"]["died"] == 1
    assert told["runs"][1]["step"] == 25


def test_watching_ends_when_all_is_done(sweep, capsys, monkeypatch):
    rounds = []

    def finish(seconds):
        rounds.append(seconds)
        jobs = [path for path in (sweep / "jobs").iterdir() if path.name != "0.json"]
        for path in jobs:
            path.unlink()
        write_json(sweep / "sweep.json", {"sweep": "mine", "total": 1, "planned": None})

    monkeypatch.setattr(command.time, "sleep", finish)
    assert command.main([str(sweep), "--watch"]) == 0
    assert rounds == [command.INTERVAL]
    assert "mine: 1 runs: 1 finished; about 0 s left" in capsys.readouterr().out


def test_a_sweep_is_found_by_its_name(sweep, monkeypatch, tmp_path, capsys):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "sweeps").rename(tmp_path / "outputs" / "sweeps")
    monkeypatch.chdir(tmp_path)
    assert find_sweep("mine").name == "mine"
    assert command.main(["others"]) == 1
    assert "known here: mine" in capsys.readouterr().err
    (tmp_path / "outputs" / "sweeps").rename(tmp_path / "sweeps")


def test_runs_of_the_protocol_that_no_job_began_are_missing(sweep):
    folders = ["pissa-tiny-s0-finished", "eva-tiny-s0-new"]
    stages = [{"name": "grid", "runs": ["id-finished", "id-new"], "folders": folders}]
    write_json(sweep / "protocol.json", {"stages": stages})
    lines = survey(sweep).lines
    assert (lines[-1].name, lines[-1].method, lines[-1].state) == (folders[1], "eva", "missing")
    assert len(lines) == 7


def test_the_time_left_is_shared_by_the_workers_and_known_by_method():
    def line(state, method, **more):
        return Line("run", method, state, **more)

    lines = [
        line("finished", "eva", seconds=100.0),
        line("finished", "eva", seconds=200.0),
        line("finished", "olora", seconds=30.0),
        line("running", "eva", step=50, steps=100),
        line("running", "olora"),
        line("missing", "pissa"),
        line("failed", "olora", reason="diverged"),
        line("failed", "olora", reason="time limit"),
    ]
    pissa = (100 + 200 + 30) / 3
    assert seconds_left(lines) == pytest.approx((75 + 30 + pissa + 30) / 2)
    assert seconds_left(lines[3:]) is None
    assert seconds_left(lines[:3]) == 0.0


def test_durations_are_readable():
    assert [readable(s) for s in (59.6, 75, 9000)] == ["1 min 0 s", "1 min 15 s", "2 h 30 min"]
