"""A damaged run is named, and the page shows the others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from markupsafe import escape
from products import chosen
from synthetic_sweeps import no_charts, write_run

from experiments.report import output as folder
from experiments.report import page
from experiments.report.__main__ import make

NAN, INFINITE = float("nan"), float("inf")
ODD = [None, "x", "", [], [1], {}, {"a": 1}, True, -1, 1e308, 10**400, NAN, INFINITE, "1.5", 2**70]
PATHS = {
    "result.json": [
        *(("run_id", "method", "seed", "metric", "score", "validation_score", "status", "model",
           "data", "control", "n_test", "majority", "loss_test", "init_seconds", "train_seconds",
           "steps", "learning_rate", "rank", "trainable_parameters", "peak_memory_bytes",
           "first_step_gradient_norm", "notes", "environment", "config", "init", "output_gap",
           "start", "end", "tested", "folder", "seeds")),
        ("environment", "python"), ("environment", "git_commit"), ("config", "lora"),
        ("config", "training"), ("end", "update_size"), ("end", "forgetting_kind"),
        ("start", "norm_A"), ("output_gap", "kl"), ("output_gap", "max_abs_logit"),
    ],
    "init.json": ["layers", ("layers", 0), ("layers", 0, "name"), ("layers", 0, "rank"),
                  ("layers", 0, "module_type"), ("layers", 0, "out_features"),
                  ("layers", 0, "captured_energy"), ("layers", 0, "error"),
                  ("layers", 0, "details")],
    "end.json": ["layers", ("layers", 0), ("layers", 0, "name"), ("layers", 0, "angle_A")],
    "spectra.json": ["layers", ("layers", 0), ("layers", 0, "name"), ("layers", 0, "taken"),
                     ("layers", 0, "singular_values"), ("layers", 0, "singular_values", 0)],
    "metrics.jsonl": [(0,), (0, "step"), (0, "split"), (0, "loss"), (0, "grad_norm"),
                      (0, "run_id"), (0, "method"), (0, "extra"), (-1, "loss")],
}  # fmt: skip
BYTES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00" * 50),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a list": lambda path: path.write_text("[1, 2]"),
    "null": lambda path: path.write_text("null"),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a circle": lambda path: (path.unlink(), path.symlink_to(path)),
    "zeros": lambda path: path.write_bytes(bytes(200)),
}
FILES = [*PATHS, "predictions.npz"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Three good runs, one of which is copied and damaged."""
    folder = tmp_path_factory.mktemp("whole")
    for method, seed in (("kaiming", 0), ("pissa", 0), ("eva", 0)):
        write_run(folder / f"{method}-{seed}", method, seed, blocks=1, steps=20, examples=50,
                  ended=True, validated=True)  # fmt: skip
    return folder


def set_at(content, path, value) -> None:
    *above, last = path if isinstance(path, tuple) else (path,)
    for key in above:
        content = content[key]
    content[last] = value


def damaged(whole: Path, runs: Path, name: str) -> Path:
    """A copy of a good run with another id."""
    folder = runs / name
    shutil.copytree(whole / "eva-0", folder)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "run_id": name}))
    return folder


def harm(folder: Path, file: str, path, value) -> None:
    text = (folder / file).read_text()
    lines = file == "metrics.jsonl"
    content = [json.loads(line) for line in text.split("\n") if line] if lines else json.loads(text)
    set_at(content, path, value)
    made = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    (folder / file).write_text(made + "\n")


def check(runs: Path, output: Path, monkeypatch) -> dict[str, str]:
    """Write the report; return what was left out or is incomplete, by run."""
    monkeypatch.setattr(folder, "draw", no_charts)
    monkeypatch.setattr(page, "bundle", lambda: "")  # takes seconds, and is equal for all pages
    report = make([runs], output)
    html = report.page.read_text()
    reasons: dict[str, str] = {}
    for problem in report.problems:
        reasons[problem.run] = reasons.get(problem.run, "") + problem.reason
        assert str(escape(problem.run)) in html or not problem.fatal
    assert {"kaiming", "pissa", "eva"} <= {row.method for row in report.rows}
    again = make([runs], output)
    assert {p.run for p in again.problems} == {p.run for p in report.problems}
    return reasons


@pytest.mark.parametrize("file", chosen(PATHS, "result.json", "end.json"))
def test_a_value_of_another_type_is_named_and_the_page_is_drawn(whole, tmp_path, monkeypatch, file):
    """All of them together with three good runs."""
    runs = tmp_path / "runs"
    shutil.copytree(whole, runs)
    count = 0
    step = {"result.json": 4, "spectra.json": 3}.get(file, 1)  # to save time
    for number, path in enumerate(PATHS[file]):
        for value in ODD[number % step :: step]:
            folder = damaged(whole, runs, f"run-{count}")
            if file == "spectra.json":  # it is read of one run an arm
                harm(folder, "result.json", ("config", "init", "niter"), count)
            harm(folder, file, path, value)
            count += 1
    reasons = check(runs, tmp_path / "report", monkeypatch)
    assert len(reasons) > count / 8


@pytest.mark.parametrize("file", chosen(FILES, "result.json", "metrics.jsonl", "spectra.json"))
def test_a_damaged_file_is_named_and_the_page_is_drawn(whole, tmp_path, monkeypatch, file):
    runs = tmp_path / "runs"
    shutil.copytree(whole, runs)
    for number, damage in enumerate(BYTES.values()):
        damage(damaged(whole, runs, f"run-{number}") / file)
    # A folder of runs lists those that have a result; a sweep's manifest lists them all.
    entries = [{"folder": str(path), "status": "finished"} for path in sorted(runs.iterdir())]
    odd = [5, None, {"folder": 7}, {"folder": "a\0b"}, {"overrides": 3}, {"status": ["x"]}]
    (runs / "manifest.json").write_text(json.dumps({"sweep": "s", "runs": entries + odd}))
    reasons = check(runs, tmp_path / "report", monkeypatch)
    optional = {"end.json", "spectra.json"}
    for number, name in enumerate(BYTES):
        unnamed = (name == "missing" and file in optional) or file == "spectra.json"
        unnamed |= file == "metrics.jsonl" and name == "empty"
        if not unnamed:
            assert any(f"run-{number}" in run for run in reasons), (file, name)
    assert sum("manifest" in run or run == "3" or run == "None" for run in reasons) >= 2


@pytest.mark.exhaustive
def test_hundreds_of_runs_and_one_huge_number(whole, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    shutil.copytree(whole, runs)
    for number in range(200):
        damaged(whole, runs, f"run-{number}")
    harm(runs / "run-7", "result.json", "score", 10**400)
    reasons = check(runs, tmp_path / "report", monkeypatch)
    assert [run for run in reasons if "run-7" in run]
