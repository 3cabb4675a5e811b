"""Whole runs on tiny models: what they write, in which order, and what a second ask does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from products import chosen

from experiments.errors import ConfigurationError, RunFailed
from experiments.measures.probe import PeakMemory, output_gap
from experiments.report.runs import read_run
from experiments.run import execute as execution
from experiments.run.execute import execute
from experiments.run.folder import identify
from lora_init import list_initializers

FILES = {
    "config.yaml", "environment.json", "init.json", "spectra.json", "metrics.jsonl", "end.json",
    "adapter", "predictions.npz", "result.json",
}  # fmt: skip
CONTROLS = {m.name for m in list_initializers() if m.control}
PRESERVING = {m.name for m in list_initializers() if m.preserves_output and m.base != "replace"}


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


METHODS = [
    spec.name
    for spec in list_initializers()
    if not (spec.needs_data and spec.request(spec.options()).sets)  # a classifier has no second set
]
KINDS = ("pissa", "eva", "lora_ga", "loftq")
"""One of each: from weights, inputs and gradients, and a replaced base."""


@pytest.mark.parametrize("method", chosen(METHODS, *KINDS))
def test_every_method_runs(configured, tiny, method):
    run = configured(*tiny, f"init={method}")
    folder = identify(run)
    result = execute(run)
    assert {path.name for path in folder.path.iterdir()} == FILES
    assert json.loads(folder.result_file.read_text()) == json.loads(json.dumps(result))
    assert result["method"] == method
    assert result["status"] == "finished"
    assert result["metric"] == "accuracy"
    assert 0.0 <= result["score"] <= 1.0
    assert result["first_step_gradient_norm"] > 0
    assert result["trainable_parameters"] > 0
    if method in PRESERVING:
        assert result["output_gap"]["max_abs_logit"] < 1e-5
    init = json.loads((folder.path / "init.json").read_text())
    assert init["method"] == method
    assert len(init["layers"]) > 0
    assert init["peak_memory_bytes"] > 10_000_000
    assert init["calibration_tokens"] > 0 if init["needs_calibration"] else True
    rows = metrics(folder)
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3]
    assert rows[-1]["split"] == "test"
    assert rows[-1]["accuracy"] == result["score"]
    with np.load(folder.path / "predictions.npz") as saved:
        assert len(saved["id"]) == len(saved["correct"]) == result["n_test"]
        assert saved["correct"].dtype == np.bool_
        assert saved["correct"].mean() == pytest.approx(result["score"])
    config = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert config == result["config"]
    assert result["end"]["update_size"] > 0
    assert result["end"]["forgetting"] > 0
    assert result["control"] == (method if method in CONTROLS else "none")
    assert read_run(folder.path)[1] == [], "a report leaves nothing out"


def test_a_finished_run_is_skipped(configured, tiny, capsys, monkeypatch):
    run = configured(*tiny)
    first = execute(run)
    monkeypatch.setattr(execution, "load_data", None)  # nothing may be loaded
    again = execute(run)
    assert again == json.loads(json.dumps(first))
    assert "finished before, skipped" in capsys.readouterr().out


def test_rerun_does_it_again_with_the_same_outcome(configured, tiny):
    first = execute(configured(*tiny))
    again = execute(configured(*tiny, "runtime.rerun=true"))
    assert again["finished_at"] >= first["finished_at"]
    assert again["test"] == first["test"]
    assert again["first_step_gradient_norms"] == first["first_step_gradient_norms"]


def test_a_killed_run_starts_over(configured, tiny, monkeypatch):
    run = configured(*tiny)
    folder = identify(run)

    def killed(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "evaluate", killed)  # after training, before the test
    with pytest.raises(KeyboardInterrupt):
        execute(run)
    assert [row["split"] for row in metrics(folder)] == ["train"] * 3 + ["update"]
    assert not folder.result_file.exists()
    monkeypatch.undo()
    execute(run)
    # Three steps, an update, validation and test: nothing of the killed run is left.
    assert len(metrics(folder)) == 6
    assert folder.finished()


def test_the_result_is_written_last(configured, tiny, monkeypatch):
    run = configured(*tiny)
    folder = identify(run)
    present = []
    write = execution.write_json

    def spy(path, content):
        if path.name == "result.json":
            present.extend(entry.name for entry in folder.path.iterdir())
        write(path, content)

    monkeypatch.setattr(execution, "write_json", spy)
    execute(run)
    assert set(present) == (FILES - {"result.json"}) | {"running.json"}


def test_methods_see_the_same_batches_and_head(configured, tiny, monkeypatch):
    seen: dict[str, list] = {}
    heads = {}
    make = execution.make_task

    for method in ("kaiming", "eva", "pissa"):

        def spying(*arguments, method=method):
            task = make(*arguments)
            collate = task.collate

            def spy(examples):
                seen.setdefault(method, []).append([example.id for example in examples])
                return collate(examples)

            task.collate = spy
            return task

        monkeypatch.setattr(execution, "make_task", spying)
        initialize = execution.initialize

        def keep_head(run, data, task, loaded, device, method=method, initialize=initialize):
            heads[method] = loaded.model.classifier.weight.detach().clone()
            return initialize(run, data, task, loaded, device)

        monkeypatch.setattr(execution, "initialize", keep_head)
        execute(configured(*tiny, f"init={method}"))
        monkeypatch.undo()
    # Calibration comes between: drop what is not a training batch of four.
    batches = {method: [b for b in seen[method] if len(b) == 4][:3] for method in seen}
    assert batches["kaiming"] == batches["pissa"] == batches["eva"]
    assert torch.equal(heads["kaiming"], heads["pissa"])
    assert torch.equal(heads["kaiming"], heads["eva"])


@pytest.mark.exhaustive
def test_seeds_are_separate(configured, tiny):
    base = execute(configured(*tiny, "init=gaussian"))
    for seed in ("init", "data", "head"):
        other = execute(configured(*tiny, "init=gaussian", f"seeds.{seed}=9"))
        assert other["first_step_gradient_norm"] != base["first_step_gradient_norm"]
    # gaussian reads no activations: its calibration seed changes the id and nothing else.
    same = execute(configured(*tiny, "init=gaussian", "seeds.calibration=9"))
    assert same["run_id"] != base["run_id"]
    assert same["test"] == base["test"]


def test_validation_is_recorded(configured, tiny):
    run = configured(*tiny, "training.validate_every=2", "training.validate_at_start=true")
    execute(run)
    steps = [row["step"] for row in metrics(identify(run)) if row["split"] == "validation"]
    assert steps == [0, 2, 3]


def test_a_causal_run(configured, tiny_causal):
    run = configured(*tiny_causal, "init=pissa")
    result = execute(run)
    assert result["metric"] == "exact_match"
    assert result["n_test"] == 8
    assert result["majority"] is None
    assert set(result["test"]) == {"loss", "answer_token_accuracy", "exact_match"}
    assert result["output_gap"]["max_abs_logit"] < 1e-5


def test_a_causal_model_learns(configured, tiny_causal):
    """Sums of two digits of a random two-layer model: the loss falls clearly within a few steps."""
    run = configured(
        *tiny_causal, "training.steps=60", "training.batch_size=32", "training.learning_rate=2e-2",
        "data.max_digits=1", "data.train_limit=64", "data.validation_limit=2", "data.test_limit=8",
    )  # fmt: skip
    execute(run)
    losses = [row["loss"] for row in metrics(identify(run)) if row["split"] == "train"]
    assert losses[-1] < 0.9 * losses[0]


def test_a_diverged_run_leaves_a_note(configured, tiny):
    run = configured(
        *tiny, "training.learning_rate=1e30", "training.steps=30", "training.warmup=0",
        "training.max_grad_norm=null",
    )  # fmt: skip
    with pytest.raises(RunFailed, match="the loss is"):
        execute(run)
    folder = identify(run)
    failure = json.loads((folder.path / "failed.json").read_text())
    assert failure["error"] == "RunFailed"
    assert failure["run_id"] == folder.id
    assert failure["step"] > 1
    assert folder.finished() is None


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_held_out_loss_that_is_not_finite_is_a_failed_run(
    configured, tiny, monkeypatch, split, value
):
    evaluate, calls = execution.evaluate, []

    def spoilt(*arguments):
        found = evaluate(*arguments)
        calls.append(found)
        if len(calls) == {"validation": 1, "test": 2}[split]:
            found.metrics["loss"] = value
        return found

    monkeypatch.setattr(execution, "evaluate", spoilt)
    run = configured(*tiny)
    with pytest.raises(RunFailed, match=rf"the {split} loss is {value}") as error:
        execute(run)
    assert error.value.reason == "diverged"
    assert identify(run).finished() is None
    assert json.loads(identify(run).failed_file.read_text())["reason"] == "diverged"


def test_answers_are_needed_for_a_score(configured, tiny_causal):
    with pytest.raises(ConfigurationError, match=r"training\.generate_limit=0"):
        execute(configured(*tiny_causal, "training.generate_limit=0"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init=pissa", "init.niter=-1"], "niter=-1"),
        (["lora.r=0"], r"lora\.r=0 is not supported: must be an integer >= 1"),
        (["lora.target_modules=[nothing]"], "nothing"),
        (["init=orthogonal", "lora.r=3"], "even"),
        (["data.text_column=txt"], "did you mean|has no such column"),
        (["training.validate_every=1", "data.validation_limit=0"], "data.validation_limit"),
    ],
)
def test_bad_settings_are_named(configured, tiny, overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        execute(configured(*tiny, *overrides))


def test_output_gap():
    before = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    after = before + torch.tensor([[0.0, 0.5], [3.0, 3.0]])
    gap = output_gap(before, after)
    assert gap["max_abs_logit"] == 3.0
    first = torch.log_softmax(after[0], -1)
    expected = 0.5 * sum(0.5 * (np.log(0.5) - float(p)) for p in first)  # the second row: no change
    assert gap["kl"] == pytest.approx(expected)
    assert output_gap(before, before) == {"max_abs_logit": 0.0, "kl": 0.0}


def test_peak_memory_sees_an_allocation():
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        torch.ones(50_000_000)
    if memory.kind == "resident":
        assert memory.bytes > before.bytes + 150_000_000
        assert memory.bytes - memory.held > 150_000_000
