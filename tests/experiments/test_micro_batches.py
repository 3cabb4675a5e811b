"""A batch in pieces learns what the whole batch does."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from experiments.config.training import TrainingConfig
from experiments.data import Completion, Labelled
from experiments.run.execute import execute
from experiments.run.folder import identify
from experiments.tasks.causal_lm import CausalLM
from experiments.tasks.text_classification import TextClassification
from experiments.training.loop import make_accelerator
from experiments.training.micro_batches import backward, pieces

CPU = make_accelerator(TrainingConfig(), "cpu")
# Answers of very different lengths: an average of the pieces' means is far from the batch's mean.
SUMS = [Completion(i, f"{i}+1=", str(i + 1) * (1 + 7 * (i % 3))) for i in range(7)]


@pytest.fixture
def causal(tiny_decoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    task = CausalLM(tokenizer, max_length=32, generate_limit=2, max_new_tokens=4)
    return AutoModelForCausalLM.from_pretrained(tiny_decoder).double(), task


def gradients(model, batch, task, size):
    model.zero_grad()
    loss = backward(model, batch, task, CPU, size)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_the_gradient_is_the_whole_batchs(causal, size):
    model, task = causal
    batch = task.collate(SUMS)
    model.zero_grad()
    whole = model(**batch).loss  # transformers' own mean over all learnt tokens
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss, found = gradients(model, batch, task, size)
    # transformers computes the loss itself in float32.
    assert float(loss) == pytest.approx(float(whole.detach()), rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)


def test_the_mean_of_means_would_be_another(causal):
    model, task = causal
    batch = task.collate(SUMS)
    whole = float(model(**batch).loss.detach())
    means = [float(model(**piece).loss.detach()) for piece in pieces(batch, 2)]
    assert abs(sum(means) / len(means) - whole) > 1e-3 * whole


def test_pieces_are_all_rows_with_little_padding(causal):
    _, task = causal
    batch = task.collate(SUMS)
    parts = list(pieces(batch, 3))
    assert [len(part["input_ids"]) for part in parts] == [3, 3, 1]
    widths = [part["input_ids"].shape[1] for part in parts]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] == batch["input_ids"].shape[1]
    for part in parts:
        assert part["attention_mask"].shape == part["labels"].shape == part["input_ids"].shape
        assert part["attention_mask"].any(0).all()
    texts = [
        task.tokenizer.decode(row[mask.bool()])
        for part in parts
        for row, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
    ]
    assert sorted(texts) == sorted(f"{e.prompt}{e.answer}[EOS]" for e in SUMS)


def test_texts_count_one_each(tiny_encoder):
    task = TextClassification(AutoTokenizer.from_pretrained(tiny_encoder), max_length=16)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).double()
    examples = [Labelled(i, "film " + "very " * i, i % 2) for i in range(5)]
    batch = task.collate(examples)
    loss, found = gradients(model, batch, task, 2)
    whole = copy.deepcopy(model)
    whole.zero_grad()
    expected = whole(**batch).loss
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-8)


def test_a_piece_with_nothing_to_learn_counts_nothing(causal):
    model, task = causal
    batch = task.collate(SUMS[:3])
    batch["labels"][1] = -100
    expected = float(model(**batch).loss.detach())
    loss, found = gradients(model, batch, task, 1)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert all(gradient.isfinite().all() for gradient in found.values())


def losses(result):
    rows = map(json.loads, (Path(result["folder"]) / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["split"] == "train"]


@pytest.mark.exhaustive
def test_a_run_in_pieces_and_checkpointed_is_the_same_run(configured, tiny_causal, monkeypatch):
    plain = configured(*tiny_causal, "init=pissa")
    small = configured(
        *tiny_causal, "init=pissa", "runtime.micro_batch_size=3",
        "runtime.gradient_checkpointing=true", "runtime.rerun=true",
    )  # fmt: skip
    assert identify(plain).id == identify(small).id
    expected = execute(plain)
    blocks = []
    forward = LlamaMLP.forward

    def counting(self, x):
        blocks.append(self.training)
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counting)
    first = losses(expected)
    found = execute(small)
    assert losses(found) == pytest.approx(first, rel=1e-5)
    assert found["loss_test"] == pytest.approx(expected["loss_test"], rel=1e-5)
    # Two layers, three steps of two pieces, each computed twice.
    assert sum(blocks) == 2 * 3 * 2 * 2
