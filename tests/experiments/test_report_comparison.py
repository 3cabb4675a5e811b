"""Two versions of the code compared, and PEFT's own results. All numbers are made up."""

import json

import numpy as np
import pytest
from scipy import stats
from synthetic_sweeps import no_charts, write_grid, write_protocol

from experiments.report import output
from experiments.report.__main__ import main, make
from experiments.report.peft_results import load_peft_results

SMALL = {"methods": ("kaiming", "pissa"), "rates": [1e-3, 3e-3], "blocks": 1, "steps": 20}


@pytest.fixture(autouse=True)
def without_charts(monkeypatch):
    monkeypatch.setattr(output, "draw", no_charts)


def results(folder):
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("runs/*/result.json")}


def edit_results(folder, edit):
    for path in folder.glob("runs/*/result.json"):
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def test_settings_are_paired_and_flagged_beyond_their_interval(tmp_path):
    """pissa starts slower in the new version. The reference is scipy's paired t-test."""
    new = write_grid(tmp_path / "new", seeds=(0, 1, 2), commit="b" * 40, **SMALL)
    old = write_grid(tmp_path / "old", seeds=(0, 1, 2), commit="a" * 40, **SMALL)
    edit_results(tmp_path / "new", lambda r: r | {
        "init_seconds": r["init_seconds"] * (1.5 if r["method"] == "pissa" else 1.0)})  # fmt: skip
    found = make([new], tmp_path / "report", other=old).comparison
    assert (found.commits, found.other_commits) == (["b" * 10], ["a" * 10])
    assert [(c.arm, c.learning_rate, c.seeds, c.flagged) for c in found.changes] == [
        ("pissa", 1e-3, 3, ["init s"]), ("pissa", 3e-3, 3, ["init s"]),
        ("kaiming", 1e-3, 3, []), ("kaiming", 3e-3, 3, []),
    ]  # fmt: skip
    ours, theirs = results(tmp_path / "new"), results(tmp_path / "old")
    names = [name for name in ours if name.startswith("pissa") and "lr1.0e-03" in name]
    pairs = [[side[name]["init_seconds"] for name in names] for side in (ours, theirs)]
    expected = stats.ttest_rel(*pairs).confidence_interval(0.95)
    measured = found.changes[0].figures["init_seconds"].difference
    assert (measured.low, measured.high) == pytest.approx((expected.low, expected.high))
    assert found.changes[0].figures["score"].difference.estimate == 0
    html = (tmp_path / "report" / "index.html").read_text()
    assert "Over code versions" in html
    assert "<dt>Beyond their interval</dt><dd>2</dd>" in html
    lines = (tmp_path / "report" / "comparison.md").read_text().splitlines()
    assert sum(line.startswith(("| kaiming", "| pissa")) for line in lines) == 4


def test_predictions_are_paired_where_seeds_are_too_few(tmp_path):
    """With two seeds only the examples can distinguish the versions."""
    new = write_grid(tmp_path / "new", seeds=(0, 1), **SMALL)
    old = write_grid(tmp_path / "old", seeds=(0, 1), **SMALL)
    for run in (tmp_path / "old" / "runs").iterdir():  # pissa loses forty right answers
        if not run.name.startswith("pissa"):
            continue
        with np.load(run / "predictions.npz") as archive:
            ids, correct = archive["id"], archive["correct"].copy()
        correct[np.flatnonzero(correct)[:40]] = False
        np.savez(run / "predictions.npz", id=ids, correct=correct)
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(result | {"score": float(correct.mean())}))
    found = make([new], tmp_path / "report", other=old).comparison
    assert [(c.arm, c.flagged) for c in found.changes] == [
        ("pissa", ["score"]), ("pissa", ["score"]), ("kaiming", []), ("kaiming", []),
    ]  # fmt: skip
    difference = found.changes[0].figures["score"].difference
    assert difference.estimate == pytest.approx(40 / 1200)
    spread = 1.96 * np.sqrt((1 / 30) * (29 / 30) / 1200)  # of a share of 1/30, equal for all seeds
    assert difference.high - difference.low == pytest.approx(2 * spread, rel=0.25)


def test_a_protocols_grid_is_compared_on_validation_and_its_choice_on_the_test_set(tmp_path):
    new = write_protocol(tmp_path / "new", seeds=(0, 1, 2), bonus=0.05, **SMALL)
    old = write_protocol(tmp_path / "old", seeds=(0, 1, 2), **SMALL)
    missing = tmp_path / "old" / "runs" / "kaiming-rotten_tomatoes-r8-lr1.0e-03-s2"
    (missing / "result.json").unlink()
    found = make([new], tmp_path / "report", other=old).comparison
    tested = {c.arm for c in found.changes if c.tested}
    assert (len(found.changes), tested) == (4, {"kaiming", "pissa"})
    for change in found.changes:
        if not change.tested:
            assert change.figures["score"].difference.estimate == pytest.approx(0.05)
    assert (found.alone, found.other_alone) == (1, 0)


def peft_result(name, score, **changes):
    """In the shape of PEFT's files; its numbers are made up."""
    adapter = {"peft_type": "LORA", "r": 32, "init_lora_weights": True, "use_rslora": False}
    return {
        "run_info": {
            "created_at": "2025-06-01T00:00:00+00:00", "experiment_name": name, "total_time": 9.0,
            "train_config": {"model_id": "some/llama", "max_steps": 5000,
                             "optimizer_kwargs": {"lr": 1e-4}},
            "peft_config": adapter, **changes,
        },
        "train_info": {"status": "success", "num_trainable_params": 9_175_040,
                       "metrics": [{"step": 250, "valid accuracy": 0.3},
                                   {"step": 5000, "test accuracy": score}]},
        "meta_info": {"package_info": {"peft-version": "0.18.0"}},
    }  # fmt: skip


@pytest.fixture
def peft_folder(tmp_path):
    folder = tmp_path / "MetaMathQA" / "results"
    folder.mkdir(parents=True)
    old = peft_result("lora/rank32", 0.9, created_at="2025-01-01T00:00:00+00:00")
    pissa = {"peft_type": "LORA", "r": 64, "init_lora_weights": "pissa", "use_rslora": True}
    failed = peft_result("lora/broken", 0.1)
    failed["train_info"]["status"] = "failed"
    for number, content in enumerate(
        [old, peft_result("lora/rank32", 0.47), peft_result("lora/pissa", 0.51, peft_config=pissa),
         peft_result("full", 0.46, peft_config=None), failed, {"other": 1}]
    ):  # fmt: skip
        (folder / f"{number}.json").write_text(json.dumps(content))
    return folder


def test_peft_results_are_read_newest_first_and_the_unreadable_named(peft_folder):
    rows, problems = load_peft_results(peft_folder)
    assert [(r.experiment, r.score, r.adapter, r.init) for r in rows] == [
        ("lora/pissa", 0.51, "LORA (rsLoRA)", "pissa"),
        ("lora/rank32", 0.47, "LORA", "true"),
        ("full", 0.46, "full fine-tuning", ""),
    ]
    first = rows[0]
    assert (first.task, first.model, first.rank) == ("MetaMathQA", "some/llama", 64)
    assert (first.learning_rate, first.steps, first.trainable) == (1e-4, 5000, 9_175_040)
    assert [problem.run for problem in problems] == ["PEFT's 4.json", "PEFT's 5.json"]
    assert "status is 'failed'" in problems[0].reason
    one, _ = load_peft_results(peft_folder / "2.json")
    assert one == [first]


def test_peft_rows_do_not_change_ours(tmp_path, peft_folder, capsys):
    sweep = write_grid(tmp_path, seeds=(0, 1), **SMALL)
    plain = make([sweep], tmp_path / "plain")
    both = make([sweep], tmp_path / "both", peft=peft_folder)
    assert repr(both.rows) == repr(plain.rows)
    html = both.page.read_text()
    assert "PEFT’s own comparison" in html
    assert "another model, other data" in html
    assert html.count(">some/llama<") == 3
    assert "| lora/pissa | MetaMathQA | some/llama |" in (tmp_path / "both/peft.md").read_text()
    assert "PEFT’s own comparison" not in plain.page.read_text()
    assert main([str(sweep), "--peft-results", str(tmp_path / "none")]) == 1
    assert "--peft-results: no file or folder" in capsys.readouterr().err
