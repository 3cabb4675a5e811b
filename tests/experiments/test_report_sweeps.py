"""Reading runs: a synthetic sweep (all of its numbers are made up), intact and damaged."""

import json
import shutil

import numpy as np
import pytest

from experiments.report.settings import arms_of, differences
from experiments.report.summary import Summarizer
from experiments.report.sweeps import load_sweeps

# score, init seconds, ‖sBA‖/‖W‖, first gradient norm, output gap: made up, and of plausible size.
SYNTHETIC = {
    "kaiming": (0.762, 0.02, 0.0, 0.9, 0.0),
    "gaussian": (0.758, 0.02, 0.0, 0.5, 0.0),
    "orthogonal": (0.764, 0.05, 0.0, 1.6, 2e-7),
    "olora": (0.731, 0.09, 0.31, 9.5, 3.1e-6),
    "pissa": (0.772, 0.6, 0.34, 4.2, 2.4e-6),
    "corda": (0.769, 7.5, 0.28, 3.7, 2.9e-6),
    "loftq": (0.755, 2.8, 0.04, 1.9, 0.21),
    "eva": (0.775, 6.1, 0.0, 2.3, 0.0),
}
SUBTRACTING = {"olora", "pissa", "corda"}
BLOCKS = {"attention.self.query": (384, 384), "attention.self.key": (384, 384),
          "attention.self.value": (384, 384), "attention.output.dense": (384, 384),
          "intermediate.dense": (1536, 384), "output.dense": (384, 1536)}  # fmt: skip
EXAMPLES, STEPS = 1200, 120


def write_run(folder, method, seed, *, learning_rate=1e-3, options=None, examples=EXAMPLES):
    """One finished run as the training application leaves it; all of its numbers are made up."""
    generator = np.random.default_rng([seed, sum(method.encode())])
    score, init_seconds, relative_norm, gradient, gap = SYNTHETIC[method]
    hardness = np.random.default_rng(7).random(examples)  # shared: some examples are hard for all
    correct = generator.normal(score - 0.5, 0.12, examples) > (hardness - 0.5) * 1.05
    folder.mkdir(parents=True)
    np.savez(folder / "predictions.npz", id=np.arange(examples)[::-1], correct=correct[::-1])
    environment = {"python": "3.11.9", "torch": "2.13.0", "platform": "Linux x86_64",
                   "cpu_count": 2, "git_commit": "0" * 40}  # fmt: skip
    config = {
        "init": {"name": method, **(options or {})},
        "model": {"name": "all-MiniLM-L6-v2"},
        "training": {"steps": STEPS, "learning_rate": learning_rate},
        "seed": seed,
        "paths": {"output": str(folder)},
        "tracking": {"name": "none"},
    }
    result = {
        "run_id": folder.name, "folder": str(folder), "method": method, "init": config["init"],
        "model": "all-MiniLM-L6-v2", "data": "rotten_tomatoes", "seed": seed,
        "seeds": {"init": seed, "data": seed}, "status": "finished", "metric": "accuracy",
        "score": float(correct.mean()), "n_test": examples, "majority": 0.5,
        "loss_test": 0.5 + generator.normal(0, 0.01),
        "output_gap": {"max_abs_logit": gap * generator.uniform(0.8, 1.2), "kl": gap**2},
        "init_seconds": init_seconds * generator.uniform(0.9, 1.1),
        "calibration_seconds": init_seconds * 0.8 if method in ("corda", "eva") else 0.0,
        "train_seconds": 21 + generator.normal(0, 0.5),
        "first_step_gradient_norm": gradient * generator.uniform(0.8, 1.25),
        "trainable_parameters": 444_674, "total_parameters": 23_157_890, "steps": STEPS,
        "learning_rate": learning_rate, "rank": 8, "environment": environment, "config": config,
        "notes": ["weights derived from 4-bit values"] if method == "loftq" else [],
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    layers = [
        {
            "name": f"encoder.layer.{block}.{name}", "module_type": "Linear",
            "out_features": out, "in_features": inside, "rank": 8, "alpha": 16, "scaling": 2.0,
            "relative_norm": relative_norm * generator.uniform(0.6, 1.4), "norm_A": 1.0,
            "norm_B": 0.0, "error": 0.09 if method == "loftq" else None, "seconds": 0.01,
            "captured_energy": None if method == "gaussian" else (
                generator.uniform(0.08, 0.32) if method in SUBTRACTING | {"eva"}
                else generator.uniform(0.01, 0.03)),
            "base": "subtract" if method in SUBTRACTING else "keep",
        }
        for block in range(6) for name, (out, inside) in BLOCKS.items()
    ]  # fmt: skip
    init = {"method": method, "base": "keep", "seconds": {"total": init_seconds},
            "peak_memory_bytes": 10**8, "calibration_tokens": 4096, "layers": layers}  # fmt: skip
    (folder / "init.json").write_text(json.dumps(init))
    speed = 20 + 400 * abs(0.79 - score)
    rows = [
        {"step": step, "split": "train", "lr": learning_rate, "grad_norm": gradient,
         "tokens_per_second": 9000.0,
         "loss": 0.42 + 0.28 * np.exp(-step / speed) + generator.normal(0, 0.035)}
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    rows.append({"step": STEPS, "split": "test", "loss": 0.5, "accuracy": result["score"]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_sweep(root, seeds=(0, 1), failed=True):
    """`root/sweeps/synthetic` and its runs in `root/runs`; one failed and one lost run if asked."""
    entries = []
    for method in SYNTHETIC:
        for seed in seeds:
            folder = root / "runs" / f"{method}-{seed}"
            write_run(folder, method, seed)
            overrides = [f"init={method}", f"seed={seed}"]
            entries.append({"folder": f"runs/{folder.name}", "overrides": overrides,
                            "status": "finished"})  # fmt: skip
    if failed:
        entries.append({"folder": "runs/pissa-7", "overrides": ["init=pissa", "seed=7"],
                        "status": "failed"})  # fmt: skip
        entries.append({"folder": "runs/lost", "overrides": ["init=eva", "seed=8"],
                        "status": "finished"})  # fmt: skip
    sweep = root / "sweeps" / "synthetic"
    sweep.mkdir(parents=True)
    manifest = {"sweep": "synthetic", "heading": "made-up numbers", "runs": entries}
    (sweep / "manifest.json").write_text(json.dumps(manifest))
    return sweep


def test_settings_that_differ_are_arms_and_warnings(tmp_path):
    for rate in (1e-3, 2e-3):
        write_run(tmp_path / f"pissa-{rate}", "pissa", 0, learning_rate=rate)
    write_run(tmp_path / "kaiming", "kaiming", 0, options={"note": 1})
    runs = load_sweeps([tmp_path]).runs
    assert differences(runs) == {"training.learning_rate": [1e-3, 2e-3]}
    arms = arms_of(runs)
    assert arms["pissa-0.001"] == "pissa · learning_rate=0.001"
    assert arms["kaiming"] == "kaiming"
    assert [row.arm for row in Summarizer(runs, arms).rows()] == [
        "kaiming", "pissa · learning_rate=0.001", "pissa · learning_rate=0.002",
    ]  # fmt: skip


def test_a_sweep_names_what_failed_and_what_never_started(tmp_path, monkeypatch):
    sweep = write_sweep(tmp_path)
    path = sweep / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["total"] = len(manifest["runs"]) + 4
    manifest["runs"].append({"folder": None, "overrides": ["init=typo"], "status": "failed"})
    path.write_text(json.dumps(manifest))
    (tmp_path / "runs" / "pissa-7").mkdir()
    told = {"run_id": "7", "error": "Diverged", "message": "loss is nan at step 3"}
    (tmp_path / "runs" / "pissa-7" / "failed.json").write_text(json.dumps(told))
    monkeypatch.chdir("/")  # run folders are found from anywhere
    found = load_sweeps([sweep])
    assert len(found.runs) == 16
    assert {problem.run: problem.reason for problem in found.problems} == {
        "sweep synthetic": "3 of its 22 runs never started",
        "init=pissa seed=7 (runs/pissa-7)":
            "the sweep marked it 'failed': Diverged: loss is nan at step 3",
        "init=eva seed=8 (runs/lost)": "its folder '/runs/lost' does not exist",
        "init=typo": "the sweep marked it 'failed'",
    }  # fmt: skip


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": [1]}', "{}"])
def test_a_broken_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="is no manifest"):
        load_sweeps([tmp_path])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "result.json").write_text("{"), "Expecting property name"),
        (lambda run: (run / "result.json").write_text('{"run_id": "x"}'), "lacks method, seed"),
        (lambda run: (run / "predictions.npz").unlink(), "predictions.npz cannot be read"),
        (lambda run: (run / "predictions.npz").write_bytes(b"PK"), "predictions.npz cannot"),
        (lambda run: (run / "init.json").write_text("[]"), "init.json cannot be read"),
        (lambda run: (run / "metrics.jsonl").write_text('{\n{"a": 1}\n'), "metrics.jsonl cannot"),
        (lambda run: shutil.copy(run.parent / "eva-0" / "predictions.npz", run), "left out"),
    ],
)  # fmt: skip
def test_each_damaged_file_is_reported(tmp_path, damage, message):
    for method in ("kaiming", "eva"):
        write_run(tmp_path / f"{method}-0", method, 0)
    damage(tmp_path / "kaiming-0")
    sweep = load_sweeps([tmp_path])
    (problem,) = sweep.problems
    assert message in problem.reason
    assert "kaiming" in problem.run
    assert len(sweep.runs) == (1 if problem.fatal else 2)


def test_a_cut_last_line_and_a_repeated_run_are_fine(tmp_path):
    write_run(tmp_path / "eva-0", "eva", 0)
    with (tmp_path / "eva-0" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12')
    sweep = load_sweeps([tmp_path, tmp_path / "eva-0"])
    assert len(sweep.runs) == 1
    assert not sweep.problems
    assert len(sweep.runs[0].metrics) == STEPS + 1


def test_the_same_run_in_two_places_is_read_once_and_said(tmp_path):
    write_run(tmp_path / "here" / "eva-0", "eva", 0)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    found = load_sweeps([tmp_path / "here", tmp_path / "there"])
    assert len(found.runs) == 1
    assert "the same run as" in found.problems[0].reason
