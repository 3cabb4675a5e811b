"""Batches that no method can change, and scores checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.data import Completion, Labelled
from experiments.data.examples import Generated
from experiments.data.judges import says_the_number
from experiments.tasks import SeededBatches, collect, draw
from experiments.tasks.batches import by_length
from experiments.tasks.causal_lm import IGNORED, CausalLM
from experiments.tasks.text_classification import TextClassification

CPU = torch.device("cpu")


def test_batches_depend_on_the_seed_alone():
    first = list(SeededBatches(examples=50, batch_size=8, steps=20, seed=3))
    torch.manual_seed(99)
    torch.rand(5)
    assert list(SeededBatches(50, 8, 20, seed=3)) == first
    assert list(SeededBatches(50, 8, 20, seed=4)) != first
    assert list(SeededBatches(50, 8, 10, seed=3)) == first[:10]


def test_batches_are_full_and_epochs_complete():
    batches = list(SeededBatches(examples=10, batch_size=4, steps=5, seed=0))
    assert [len(batch) for batch in batches] == [4] * 5
    order = [index for batch in batches for index in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert [len(batch) for batch in SeededBatches(3, 8, 2, seed=0)] == [8, 8]


def test_draw():
    assert draw(100, 10, seed=1) == draw(100, 10, seed=1) != draw(100, 10, seed=2)
    assert sorted(draw(5, 10, seed=0)) == list(range(5))


def test_by_length_shares_the_work():
    lengths = [3, 9, 1, 7, 5]
    assert by_length(lengths, 2) == [[1, 3], [4, 0], [2]]
    assert by_length(lengths, 2, part=(0, 2)) + by_length(lengths, 2, part=(1, 2)) == [
        [1, 3], [2], [4, 0],
    ]  # fmt: skip


def test_collect_orders_and_averages():
    rows = [
        {"id": 5, "correct": True, "score": -1.0, "loss": 6.0, "weight": 3, "extra": 1.0},
        {"id": 2, "correct": False, "score": -2.0, "loss": 2.0, "weight": 1, "extra": 0.0},
        {"id": 9, "correct": None, "score": -3.0, "loss": 0.0, "weight": 4, "extra": 0.5},
    ]
    result = collect(rows, "exact_match")
    assert result.metrics == {"loss": 1.0, "extra": 0.5, "exact_match": 0.5}
    assert result.ids.tolist() == [2, 5]
    assert result.correct.tolist() == [False, True]
    assert result.score.tolist() == [-2.0, -1.0]


class Constant(torch.nn.Module):
    """Always the same logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids, **others):
        return type("Output", (), {"logits": self.logits.expand(len(input_ids), -1)})


def test_classification_is_scored(tiny_encoder):
    task = TextClassification(AutoTokenizer.from_pretrained(tiny_encoder), max_length=6)
    examples = [Labelled(7, "good film", 1), Labelled(3, "bad film very very very very very", 0)]
    batch = task.collate(examples)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].sum(1).tolist() == [2, 6]
    assert batch["labels"].tolist() == [1, 0]
    rows = list(task.rows(Constant([0.0, 1.0]), examples, 1, CPU))
    result = collect(rows, task.metric)
    assert result.ids.tolist() == [3, 7]
    assert result.correct.tolist() == [False, True]
    assert result.score[1] == pytest.approx(-math.log(1 + math.exp(-1)), abs=1e-6)
    assert result.metrics["loss"] == pytest.approx(-result.score.mean(), abs=1e-6)
    assert task.majority([*examples, examples[0]]) == pytest.approx(2 / 3)


@pytest.fixture
def causal(tiny_decoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    return CausalLM(tokenizer, max_length=16, generate_limit=2, max_new_tokens=4)


def test_the_prompt_is_not_learnt(causal):
    batch = causal.collate([Completion(0, "1+2=", "3"), Completion(1, "10+20=", "30")])
    assert batch["input_ids"].shape == (2, 9)
    assert batch["attention_mask"].sum(1).tolist() == [6, 9]
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [2, 3]  # the answer and its end
    learnt = batch["labels"][1][batch["labels"][1] != IGNORED]
    assert causal.tokenizer.decode(learnt) == "30[EOS]"


def test_a_long_example_keeps_its_answer(causal):
    ids, labels, answer = causal.tokenize(Completion(0, "1" * 30 + "=", "42", reasoning="2+2"))
    assert len(ids) == len(labels) == 16
    assert causal.tokenizer.decode(ids).endswith("=2+242[EOS]")
    assert answer == 3
    ids, labels, _ = causal.tokenize(Completion(0, "1=", "42", reasoning="3" * 40))
    assert len(ids) == 16
    assert causal.tokenizer.decode(ids).endswith("342[EOS]")


def test_completions_are_scored(causal, tiny_decoder):
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    examples = [Completion(i, f"{i}+{i}=", str(2 * i)) for i in range(5)]
    with torch.inference_mode():
        rows = list(causal.rows(model, examples, 2, CPU))
    assert sorted(row["id"] for row in rows if row["correct"] is not None) == [0, 1]
    row = next(row for row in rows if row["id"] == 4)
    batch = causal.collate([examples[4]])
    with torch.inference_mode():
        loss = model(**batch).loss
    assert row["loss"] / row["weight"] == pytest.approx(float(loss), rel=1e-5)
    assert row["weight"] == 2
    assert row["score"] == pytest.approx(-row["loss"], rel=1e-6)  # all that is learnt is answer
    assert 0.0 <= row["answer_token_accuracy"] <= 1.0


def test_generation_ignores_padding(causal, tiny_decoder):
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    examples = [Completion(0, "1+2=", "3"), Completion(1, "11+22+33=", "66")]
    together = causal.generate(model, examples, CPU)
    alone = [causal.generate(model, [example], CPU)[0] for example in examples]
    assert together == alone


def test_a_model_that_knows_the_answer_is_right(causal, monkeypatch, tiny_decoder):
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    said = [Generated("3"), Generated("4")]
    monkeypatch.setattr(causal, "generate", lambda model, examples, device: said)
    examples = [Completion(0, "1+2=", " 3"), Completion(1, "2+3=", " 5")]
    with torch.inference_mode():
        result = collect(list(causal.rows(model, examples, 2, CPU)), causal.metric)
    assert dict(zip(result.ids.tolist(), result.correct.tolist(), strict=True)) == {
        0: True, 1: False,
    }  # fmt: skip
    assert result.correct.dtype == np.bool_


def test_the_datas_judge_decides(tiny_decoder, monkeypatch):
    task = CausalLM(AutoTokenizer.from_pretrained(tiny_decoder), 16, 2, 4, says_the_number)
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    said = [Generated("7 - 4 = 3.0"), Generated("7 - 4 = 3.0", ended=False)]
    monkeypatch.setattr(task, "generate", lambda model, examples, device: said)
    examples = [Completion(0, "1+2=", " 3"), Completion(1, "1+2=", " 3")]
    with torch.inference_mode():
        result = collect(list(task.rows(model, examples, 2, CPU)), task.metric)
    assert result.correct.tolist() == [True, False]
    assert result.said == tuple(said)


def test_generation_tells_whether_it_came_to_an_end(causal, tiny_decoder):
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    examples = [Completion(0, "1+2=", "3"), Completion(1, "11+22+33=", "66")]
    assert [said.ended for said in causal.generate(model, examples, CPU)] == [False, False]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[causal.tokenizer.eos_token_id] = 1.0
        model.model.norm.weight.zero_()  # all logits are equal: the first token, which is padding
    model.generation_config.suppress_tokens = [
        i for i in range(len(causal.tokenizer)) if i != causal.tokenizer.eos_token_id
    ]
    assert causal.generate(model, examples, CPU) == [Generated("", True)] * 2


def test_a_tokenizer_that_puts_a_space_first_gets_no_second():
    """Llama-2's does: " 42" alone would be "  42", which follows nothing it was trained on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(["<s>", "</s>", "▁", "▁so", "▁it", "▁is", "4",
                                                      "2", "▁a"])}  # fmt: skip
    spaced = Tokenizer(models.BPE(vocabulary, [], unk_token="<s>", fuse_unk=False))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    spaced.decoder = decoders.Metaspace()
    spaced.add_tokens(["▁so", "▁it", "▁is", "▁a"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spaced, eos_token="</s>", pad_token="</s>", unk_token="<s>"
    )
    task = CausalLM(tokenizer, max_length=32, generate_limit=1, max_new_tokens=1)
    assert task.puts_space_first
    tokens = tokenizer.convert_ids_to_tokens(task.plain(" 42"))
    assert (
        tokens
        == tokenizer.convert_ids_to_tokens(
            tokenizer("so 42", add_special_tokens=False)["input_ids"]
        )[-3:]
    )
