"""`python -m experiments.gpu` in its small form, on the CPU."""

import importlib
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from experiments.gpu import __main__ as command
from experiments.gpu import agreement, lifecycle, promises, report
from experiments.gpu.expectations import SECONDS, verdicts
from experiments.gpu.parts import PARTS, Part, selected
from experiments.gpu.process import run_here, run_in_process
from experiments.gpu.record import Record
from experiments.gpu.specimens import Specimen
from experiments.gpu.task import Task
from experiments.gpu.waits import MESSAGE, counted_waits
from lora_init import list_initializers

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("hydra", "omegaconf", "wandb", "beartype", "pytest", "bitsandbytes", "peft")
PISSA = next(spec for spec in list_initializers() if spec.name == "pissa")


@pytest.fixture
def task():
    return Task(Record("agreement"), torch.device("cpu"), small=True)


@pytest.fixture(scope="module")
def records():
    """What the parts found that tests look at together."""
    return {}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_part_ends_without_a_failure(part, records, tmp_path):
    record = run_here(part, Record(part.name, tmp_path / "part.json"), True, math.inf)
    assert (record.status, record.message) == ("done", "")
    assert not [row for row in record.rows if "failed" in row]
    assert record.wrong == []
    assert record.rows or record.notes
    assert Record.read(part.name, tmp_path / "part.json").to_dict() == record.to_dict()
    records[part.name] = record


def test_the_report_has_every_part_and_goal(records, tmp_path):
    report.write(tmp_path, records)
    whole = json.loads((tmp_path / "report.json").read_text())
    page = (tmp_path / "report.md").read_text()
    assert set(whole["parts"]) == set(records)
    for name in records:
        assert f"## {name}" in page
    for goal in verdicts(records):
        assert goal["goal"] in page


def test_goals_are_judged_in_the_full_form_only():
    record = Record("methods", rows=[{"name": "pissa r=16", "model_seconds": 3.0}])
    for small, met in ((False, False), (True, None)):
        (goal,) = [one for one in verdicts({"methods": record}, small) if "r=16" in one["goal"]]
        assert (goal["found"], goal["met"]) == (3.0, met)


@pytest.mark.exhaustive
def test_a_part_runs_in_a_process_without_optional_packages(tmp_path, monkeypatch):
    for package in OPTIONAL:
        (tmp_path / f"{package}.py").write_text("raise ModuleNotFoundError(__name__)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = run_in_process(selected(["device"])[0], tmp_path, small=True, seconds=100)
    assert record.status == "done", (tmp_path / "device.log").read_text()
    assert json.loads((tmp_path / "device.json").read_text())["status"] == "done"
    modules = ", ".join(f"experiments.gpu.{part.module}" for part in PARTS)
    code = f"import {modules}, experiments.gpu.__main__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ)


def test_a_part_that_takes_too_long_is_killed_and_the_next_one_runs(tmp_path):
    killed = run_in_process(selected(["methods"])[0], tmp_path, small=True, seconds=0.2)
    assert killed.status == "killed"
    assert "0 s" in killed.message
    assert Record.read("methods", tmp_path / "methods.json").status == "killed"


def finished(status="done", wrong=()):
    """A stand-in for `run_in_process`."""

    def run(part, folder, small, seconds):
        record = Record(part.name, folder / f"{part.name}.json", wrong=list(wrong))
        record.end(status, "" if status == "done" else "out of memory", 1.0)
        return record

    return run


@pytest.mark.parametrize(
    ("status", "wrong", "code"),
    [("done", (), 0), ("failed", (), 0), ("killed", (), 0), ("done", ("gap is 1",), 1)],
)
def test_only_wrong_results_make_the_command_fail(status, wrong, code, tmp_path, monkeypatch):
    monkeypatch.setattr(command.run_parts, "__defaults__", (finished(status, wrong),))
    assert command.main(["--small", "--output", str(tmp_path)]) == code
    whole = json.loads((tmp_path / "report.json").read_text())
    assert {part["status"] for part in whole["parts"].values()} == {status}
    assert ("gap is 1" in (tmp_path / "report.md").read_text()) == bool(wrong)


def test_parts_without_time_are_skipped_and_say_so(tmp_path):
    found = command.run_parts(PARTS, tmp_path, True, 1.0, finished())
    assert {record.status for record in found.values()} == {"skipped"}
    assert all("were left" in record.message for record in found.values())


@pytest.mark.parametrize("arguments", [["--parts", "gpu"], []])
def test_a_wrong_setting_is_refused_by_name(arguments, tmp_path, capsys):
    if torch.cuda.is_available() and not arguments:
        pytest.skip("needs a machine without CUDA")
    assert command.main([*arguments, "--output", str(tmp_path / "made")]) == 2
    told = capsys.readouterr().err
    assert ("--parts=gpu" if arguments else "--small") in told
    assert not (tmp_path / "made").exists()


# -- the checks find what is wrong -----------------------------------------------------------------


def changed(model, name="layers.1", by=1e-3):
    with torch.no_grad():
        layer = model.layers[name]
        layer.initial_lora_B.mul_(1 + by)
    return model


def test_another_product_is_a_wrong_result(task):
    specimen = Specimen("Linear", torch.float32, 32)
    reference = agreement.adapted(PISSA, specimen, "cpu", None)
    model = changed(agreement.adapted(PISSA, specimen, "cpu", None))
    agreement.judged(task, "pissa", {"gap_device": agreement.gap(model, reference)})
    assert "gap_device" in task.record.wrong[0]


@pytest.mark.parametrize("value", [2.0, math.nan, math.inf])
@pytest.mark.parametrize("key", ["gap_cpu", "objective_device", "step_0", "unloaded"])
def test_figures_above_their_limit_or_not_finite_are_wrong(key, value, task):
    agreement.judged(task, "any", {key: value})
    assert len(task.record.wrong) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_life_is_found(dtype):
    specimen = Specimen("Linear", dtype, 32)
    base = specimen.build()
    twin = lifecycle.twin(base)
    model = changed(agreement.adapted(PISSA, specimen, "cpu", None, base=base), by=0.1)
    life = lifecycle.lived(model, twin, specimen.inputs(), keeps_output=True)
    broken = {"disabled", "unloaded"} if dtype == torch.float32 else {"step_0"}
    assert broken <= set(life.broken)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_packed_specimens_live(kind, task):
    pytest.importorskip("bitsandbytes")
    specimen = Specimen(kind, torch.float16, 64)
    assert agreement.compared(task, PISSA, specimen, ("device",), True) == {"gap_device": 0.0}
    assert agreement.life(task, PISSA, specimen, False).broken == []


def test_a_promise_that_fails_is_a_wrong_result(task):
    promises.record(task, "a check", lambda task: (math.nan, 1.0))
    assert "a check" in task.record.wrong[0]


def test_an_exception_is_a_failed_row_and_the_next_row_follows(task):
    with task.guarded("first"):
        raise RuntimeError("no kernel")
    task.record.row("second", ms=1.0)
    assert "no kernel" in task.record.rows[0]["failed"]
    assert task.record.rows[1] == {"name": "second", "ms": 1.0}


def test_a_method_that_raises_on_the_device_is_a_wrong_result(task):
    with task.guarded("pissa", refutes=True):
        raise RuntimeError("no kernel")
    assert "pissa" in task.record.wrong[0]


def test_an_exception_of_a_part_is_recorded(tmp_path, monkeypatch):
    def run(task):
        task.record.row("first", ms=1.0)
        raise RuntimeError("no kernel")

    part = Part("device", "device_facts", 20, "")
    monkeypatch.setattr(importlib.import_module("experiments.gpu.device_facts"), "run", run)
    record = run_here(part, Record("device", tmp_path / "device.json"), True, math.inf)
    assert (record.status, len(record.rows)) == ("failed", 1)
    assert "no kernel" in record.message


def test_waits_are_counted_by_line():
    with counted_waits() as waits:
        for _ in range(3):
            warnings.warn(f"called a {MESSAGE}", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert list(waits.values()) == [3]
    assert next(iter(waits)).startswith("test_gpu_suite.py:")


# -- documents -------------------------------------------------------------------------------------


def test_the_documented_expectations_are_those_of_the_report():
    page = (ROOT / "docs" / "gpu.md").read_text()
    for method, (small, large) in SECONDS.items():
        assert f"| {method} | {small:.2f} | {large:.2f} |" in page


def test_make_gpu_installs_nothing():
    # The tests run under make themselves: its flags would print the folder as well.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "gpu", "PYTHON=python3"]
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["python3", "-m", "experiments.gpu"]
