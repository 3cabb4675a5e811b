"""The recipes of papers: each value against the published table, and a run of each, made small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from products import chosen

from experiments.config.training import steps_of
from experiments.errors import ConfigurationError
from experiments.run.execute import execute

ALL = "all-linear"
METAMATH = ("metamath", 100_000)
WHOLE = ("metamath", None)

# Written down from the papers' tables, not from the files.
# model, init and its options, data, r, alpha, targets,
# steps, batch, rate, schedule, warm-up, decay
TABLE = {
    "pissa_llama2_7b": (
        "llama2_7b", "pissa", {"niter": None}, METAMATH, 128, 128, ALL,
        782, 128, 2e-5, "cosine", 0.03, 0.0,
    ),
    "pissa_mistral_7b": (
        "mistral_7b", "pissa", {"niter": None}, METAMATH, 128, 128, ALL,
        782, 128, 2e-5, "cosine", 0.03, 0.0,
    ),
    "corda_llama2_7b": (
        "llama2_7b", "corda", {"corda_method": "ipm"}, METAMATH, 128, 128, ALL,
        782, 128, 2e-5, "cosine", 0.03, 0.0,
    ),
    "corda_kpm_llama2_7b": (
        "llama2_7b", "corda", {"corda_method": "kpm"}, METAMATH, 128, 128, ALL,
        782, 128, 2e-5, "cosine", 0.03, 0.0,
    ),
    "loftq_llama2_7b": (
        "llama2_7b", "loftq", {"loftq_bits": 4, "loftq_iter": 5}, ("gsm8k", None), 64, 16, ALL,
        701, 64, 3e-4, "cosine", 0.03, 0.1,
    ),
    "eva_llama2_7b": (
        "llama2_7b", "eva", {"rho": 2.0}, WHOLE, 16, 1, ALL,
        12_344, 32, 5e-4, "cosine", 0.03, 0.0,
    ),
    "milora_llama2_7b": (
        "llama2_7b", "milora", {}, WHOLE, 64, 64,
        ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        74_063, 16, 3e-4, "linear", 100 / 74_063, 0.0,
    ),
    "lora_ga_llama2_7b": (
        "llama2_7b", "lora_ga", {"gamma": 16}, METAMATH, 8, 16, ALL,
        782, 128, 2e-5, "cosine", 0.03, 0.0,
    ),
    "peft_benchmark_llama32_3b": (
        "llama32_3b", "kaiming", {}, WHOLE, 32, 64, ["q_proj", "v_proj"],
        5000, 4, 1e-4, "cosine", 0.0, 0.1,
    ),
}  # fmt: skip
HUB = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "mistral_7b": "mistralai/Mistral-7B-v0.1",
    "llama32_3b": "meta-llama/Llama-3.2-3B",
}
FOLDER = Path(__file__).resolve().parents[2] / "conf" / "experiment"


def test_every_recipe_is_in_the_table():
    assert {path.stem for path in FOLDER.glob("*.yaml")} - {"arithmetic"} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_is_the_papers(configured, name):
    (model, init, options, data, r, alpha, targets,
     steps, batch, rate, schedule, warmup, decay) = TABLE[name]  # fmt: skip
    run = configured(f"experiment={name}")
    assert (run.model.name, run.model.path, run.model.dtype) == (model, HUB[model], "bfloat16")
    assert run.model.quantization == ("nf4" if init == "loftq" else None)
    assert run.init.name == init
    assert {key: getattr(run.init, key) for key in options} == options
    assert (run.data.name, run.data.train_limit, run.data.test_limit) == (*data, None)
    assert (run.lora.r, run.lora.lora_alpha, run.lora.target_modules) == (r, alpha, targets)
    assert run.lora.use_rslora == (init == "lora_ga")
    assert (run.lora.lora_dropout, run.lora.use_dora) == (0.0, False)
    training = run.training
    assert (training.steps, training.batch_size, training.learning_rate) == (steps, batch, rate)
    assert (training.schedule, training.weight_decay) == (schedule, decay)
    assert training.warmup == pytest.approx(warmup, abs=1e-5)
    assert training.lora_plus_ratio == 1.0
    assert training.generate_limit >= 1319  # GSM8K's test set, all of it
    assert training.max_new_tokens >= 500
    # Everything else a table names by words.
    assert (run.calibration.samples == 256) == (init == "corda" or name in KEEPS_DEFAULT)
    assert (run.calibration.path is not None) == (name == "corda_kpm_llama2_7b")
    assert run.training.batch_size % (run.runtime.micro_batch_size or 1) == 0


KEEPS_DEFAULT = {
    "pissa_llama2_7b", "pissa_mistral_7b", "loftq_llama2_7b", "milora_llama2_7b",
    "peft_benchmark_llama32_3b",
}  # fmt: skip


def test_an_epoch_follows_the_batch_size_and_the_limit(configured):
    run = configured(
        "experiment=pissa_llama2_7b", "training.batch_size=64", "data.train_limit=1000"
    )
    assert run.training.steps == 16
    assert [steps_of(1, 100, 10), steps_of(1, 101, 10), steps_of(0.5, 100, 10)] == [10, 11, 5]
    assert steps_of(1, 1, 128) == 1


def test_knowledge_preserving_asks_for_its_questions(configured, word_problems):
    """Before anything is loaded: calibrated on the task, it would be another method."""
    run = configured("experiment=corda_kpm_llama2_7b", f"data.path={word_problems}")
    with pytest.raises(ConfigurationError, match=r"calibration\.path=.*NQ-open\.train\.jsonl"):
        execute(run)


@pytest.fixture
def small(wide_decoder, word_problems, tmp_path):
    """What makes a recipe small enough for a test, and nothing more."""
    questions = tmp_path / "questions.jsonl"
    lines = [json.dumps({"question": f"{n} + {n} =?", "answer": [str(n)]}) for n in range(20, 30)]
    questions.write_text("\n".join(lines) + "\n")

    def overrides(name):
        found = [
            f"experiment={name}", f"model.path={wide_decoder}", f"data.path={word_problems}",
            "data.validation_limit=2", "data.test_limit=2", "lora.r=4",
            "training.steps=2", "training.batch_size=6", "training.max_length=48",
            "training.eval_batch_size=4", "training.max_new_tokens=2",
            "calibration.samples=8", "calibration.batch_size=4",
            "measures.forgetting_texts=1", "measures.intruder_layers=0",
            "runtime.device=cpu", "runtime.threads=1", f"paths.outputs={tmp_path}/outputs",
        ]  # fmt: skip
        if name != "peft_benchmark_llama32_3b":
            found.append("runtime.micro_batch_size=4")
        if name == "loftq_llama2_7b":
            found.append("data.validation_share=0.2")
        else:
            found.append("data.validation_share=0.3")
        if name == "corda_kpm_llama2_7b":
            found.append(f"calibration.path={questions}")
        return found

    return overrides


@pytest.mark.parametrize("name", chosen(TABLE, *list(TABLE)[:3]))
def test_a_recipe_runs_from_end_to_end(configured, small, name):
    result = execute(configured(*small(name)))
    assert result["status"] == "finished"
    assert result["method"] == TABLE[name][1]
    assert (result["metric"], result["n_test"], result["steps"]) == ("exact_match", 2, 2)
    assert result["score"] == 0.0  # of two random tokens
    assert 0.0 < result["loss_test"] < 20.0
    folder = Path(result["folder"])
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [set(row) for row in answers] == [{"id", "correct", "ended", "said"}] * 2
    # LoftQ's is for its own base, and has a name of its own.
    assert len(list((folder / "adapter").glob("*adapter*.safetensors"))) == 1
    if name in ("pissa_llama2_7b", "pissa_mistral_7b", "milora_llama2_7b", "corda_llama2_7b",
                "corda_kpm_llama2_7b", "lora_ga_llama2_7b"):  # fmt: skip
        # A bfloat16 base is not edited: the start is subtracted in the forward pass.
        assert result["output_gap"]["max_abs_logit"] < 0.05
