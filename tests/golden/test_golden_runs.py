"""Run folders and sweeps that commit 1d1a888 wrote are finished, read and continued."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import golden_networks as golden
import pytest
import vl_convert

ROOT = Path(__file__).parents[2]
EMPTY = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
COMMANDS = golden.read_json("runs")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of the golden runs, which is the working folder: their paths are relative."""
    shutil.copytree(golden.DATA / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    monkeypatch.syspath_prepend(str(ROOT))
    return tmp_path / "runs"


@pytest.fixture
def command(monkeypatch, capsys):
    """`command("experiments.train", "seed=0")` is that command; it returns what is printed."""

    def run(module: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module may be imported already
            status = 0
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                status = end.code
        assert not status, status
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes seconds and reads no run: the library that draws is left out."""
    for name in ("vegalite_to_svg", "vegalite_to_png", "javascript_bundle"):
        monkeypatch.setattr(vl_convert, name, lambda *_, **__: EMPTY)


def result_of(pattern: str) -> dict[str, Any]:
    (path,) = Path("results/runs").glob(f"{pattern}/result.json")
    return json.loads(path.read_text())


def test_a_sweep_skips_finished_runs_and_scores_unread_ones(folder, command):
    """The one without a test score is scored with the adapter in its folder, and not trained."""
    (finished,) = folder.glob("results/runs/kaiming-*/result.json")
    before, trained = finished.read_bytes(), result_of("eva-*")
    assert trained["tested"] is False
    command("experiments.train", *COMMANDS["again"])
    assert finished.read_bytes() == before
    result = result_of("eva-*")
    expected = json.loads((folder / "unread_result.json").read_text())
    assert result["run_id"] == trained["run_id"] == expected["run_id"]
    assert result["train_seconds"] == trained["train_seconds"]
    assert result["tested"]
    assert result["loss_test"] == pytest.approx(expected["loss_test"], rel=1e-5)
    assert result["score"] == expected["score"]
    manifest = json.loads((folder / "results/sweeps/golden/manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert len(manifest["runs"]) == 2


@pytest.mark.usefixtures("no_pictures")
def test_the_report_reads_a_sweep(folder, command):
    printed = command("experiments.report", "results/sweeps/golden")
    assert all(method in printed for method in ("kaiming", "pissa"))
    assert "left out" not in printed
    assert "incomplete" not in printed
    page = folder / "results/sweeps/golden/report/index.html"
    assert "pissa" in page.read_text(encoding="utf-8")


def test_a_stopped_run_continues(folder, command):
    """The rows that it wrote before it stopped stay, and the result is that of one process."""
    (metrics,) = folder.glob("results/runs/corda-*/metrics.jsonl")
    stopped = metrics.read_text()
    command("experiments.train", *COMMANDS["stopped"])
    expected = json.loads((folder / "stopped_result.json").read_text())
    assert result_of("corda-*")["loss_test"] == pytest.approx(expected["loss_test"], rel=1e-5)
    assert metrics.read_text().startswith(stopped)
