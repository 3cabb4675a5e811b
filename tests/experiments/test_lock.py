"""The lock of a run: one process at a time, and nothing is held by a dead process."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from experiments.config.training import TrainingConfig
from experiments.errors import RunElsewhere
from experiments.run import lock
from experiments.run.execute import execute
from experiments.run.files import write_json
from experiments.run.folder import RunFolder, identify
from experiments.run.lock import acquire, claim, heartbeat, is_held, release
from experiments.run.state import state_of
from experiments.training.loop import make_accelerator


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder("0123456789", tmp_path / "runs" / "pissa-0123456789")


@pytest.fixture
def alone():
    return make_accelerator(TrainingConfig(), "cpu")


def test_a_run_of_another_process_is_left_alone(configured, tiny):
    run = configured(*tiny)
    folder = identify(run)
    held = acquire(folder, wait=False)
    assert state_of(folder) == "running"
    with pytest.raises(RunElsewhere, match="another process works on this run"):
        execute(run)
    assert not folder.path.exists()
    release(folder, held)
    assert state_of(folder) == "missing"
    execute(run)
    assert state_of(folder) == "finished"
    assert not folder.lock_file.exists()


def test_a_waiting_process_says_so_and_takes_the_result(configured, tiny, capsys, monkeypatch):
    monkeypatch.setattr(lock, "POLL", 0.01)
    run = configured(*tiny)
    held = acquire(identify(run), wait=False)
    threading.Timer(0.5, release, (identify(run), held)).start()
    assert execute(run, wait=True)["status"] == "finished"
    assert "waiting: another process works on this run" in capsys.readouterr().out


def test_the_heartbeat_reports_the_progress(folder, alone, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    with claim(folder, 200, alone) as mine:
        mine.begin()
        assert heartbeat(folder)["step"] == 0
        mine.reached(7, 90)
        while heartbeat(folder)["step"] != 7:
            time.sleep(0.01)
        facts = json.loads(folder.running_file.read_text())
        assert (facts["run_id"], facts["pid"], facts["steps"]) == (folder.id, os.getpid(), 90)
        assert set(facts) == {"run_id", "host", "pid", "started", "step", "steps", "updated"}
        message = rf"process {os.getpid()} on .* \(step 7 of 90, \d+ s ago\)"
        with pytest.raises(RunElsewhere, match=message):
            acquire(folder, wait=False)
    assert heartbeat(folder) is None
    assert not is_held(folder)


def test_a_full_disk_does_not_stop_the_heartbeat(folder, alone, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.001)
    with claim(folder, 90, alone) as mine:
        mine.begin()
        tried = []

        def full(*arguments):
            tried.append(arguments)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(lock, "write_json", full)
        while len(tried) < 3:
            time.sleep(0.001)


@pytest.mark.parametrize(("error", "left"), [(ValueError, False), (KeyboardInterrupt, True)])
def test_only_an_interrupted_run_leaves_a_heartbeat(folder, alone, error, left):
    def work():
        with claim(folder, 9, alone) as mine:
            mine.begin()
            raise error

    with pytest.raises(error):
        work()
    assert folder.running_file.exists() == left
    assert state_of(folder) == "died"


def test_another_machines_heartbeat_holds_the_run_while_it_is_fresh(folder, alone):
    """A network file system does not share its locks."""
    facts = {"host": "elsewhere", "pid": 5, "step": 3, "steps": 9}
    write_json(folder.running_file, {**facts, "updated": lock.now()})
    assert is_held(folder)
    with pytest.raises(RunElsewhere, match="process 5 on elsewhere"), claim(folder, 9, alone):
        pass
    old = time.strftime(lock.CLOCK, time.gmtime(time.time() - lock.STALE - 5))
    write_json(folder.running_file, {**facts, "updated": old})
    assert state_of(folder) == "died"
    with claim(folder, 9, alone):
        pass


def test_many_hold_it_one_at_a_time(folder, tmp_path, monkeypatch):
    """The kernel's lock belongs to the open file, so threads behave like processes here."""
    monkeypatch.setattr(lock, "POLL", 0.0001)
    log = []

    def work():
        for _ in range(15):
            held = acquire(folder, wait=True)
            log.append("in")
            time.sleep(0.0001)
            log.append("out")
            release(folder, held)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log == ["in", "out"] * 60
    assert not (tmp_path / "runs").exists()
