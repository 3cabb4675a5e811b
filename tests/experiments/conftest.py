"""Compositions, and models small enough that a run takes a second."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # experiments/ is an application: it is run from here, not installed

from experiments import train  # noqa: E402
from experiments.config import register_schemas, resolve  # noqa: E402

register_schemas()

WHO = ["Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo"]


@pytest.fixture
def composed():
    """`composed("init=pissa", config="train")` is what Hydra makes of these overrides."""

    def build(*overrides: str, config: str = "train"):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose(config, overrides=list(overrides))

    return build


@pytest.fixture
def configured(composed):
    """The same as a plain `RunConfig`."""
    return lambda *overrides, config="train": resolve(composed(*overrides, config=config))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """A folder with a random two-layer BERT and a word-level tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-encoder")
    words = ["the", "film", "is", "good", "bad", "not", "very"]
    tokenizer = word_tokenizer(words)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory) -> Path:
    """A folder with a random two-layer Llama and a tokenizer of single characters."""
    return random_llama(tmp_path_factory.mktemp("tiny-decoder"), width=32)


@pytest.fixture(scope="session")
def wide_decoder(tmp_path_factory) -> Path:
    """The same of the least width that bitsandbytes takes at 4 bits on every CPU."""
    return random_llama(tmp_path_factory.mktemp("wide-decoder"), width=64)


def random_llama(folder: Path, width: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer(list("0123456789+-= "), characters=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=2 * width, max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(words: list[str], characters: bool = False):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["[PAD]", "[UNK]", "[EOS]", *words]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Split(Regex("."), "isolated") if characters else pre_tokenizers.Whitespace()
    )
    if characters:
        tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def reviews_csv(tmp_path_factory) -> Path:
    """Sixty labelled sentences of the tiny encoder's words."""
    path = tmp_path_factory.mktemp("table") / "reviews.csv"
    lines = ["review,verdict,film"]
    for number in range(60):
        word, verdict = (("good", "fresh"), ("bad", "rotten"))[number % 2]
        filler = " ".join(["very"] * (number // 10) + ["not"] * (number % 10))
        lines.append(f"the film is {word} {filler},{verdict},film {number // 4}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def word_problems(tmp_path_factory) -> Path:
    """A folder with MetaMathQA's and GSM8K's files, in their formats, with a few sums in them."""
    folder = tmp_path_factory.mktemp("word-problems")
    rows = []
    for number in range(12):
        have, more = number + 2, 3 * number + 1
        question = f"{WHO[number]} has {have} pens and buys {more} more. How many are there?"
        solution = f"{have} + {more} = {have + more}\nThe answer is: {have + more}"
        masked = question.replace(f"{more} more", "x more")
        backward = f"{masked} If it is {have + more}, what is the value of unknown variable x?"
        for kind, query, original, response in (
            ("GSM_AnsAug", question, question, solution),
            ("GSM_Rephrased", f"Tell me: {question}", question, solution),
            ("GSM_FOBAR", backward, masked, f"x = {more}\nThe answer is: {more}"),
            ("MATH_AnsAug", f"Halve {number}.", f"Halve {number}, {WHO[number]}.",
             f"$\\frac{{{number}}}{{2}}$\nThe answer is: \\frac{{{number}}}{{2}}"),
        ):  # fmt: skip
            rows.append({"query": query, "response": response, "type": kind,
                         "original_question": original})  # fmt: skip
    (folder / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    for split, count in (("train", 20), ("test", 6)):
        lines = []
        for number in range(count):
            have, price = 600 + number, len(split)
            total = have * price
            worked = f"It is {have} * {price} = <<{have}*{price}={total}>>{total}\n#### {total:,}"
            question = f"{WHO[number % 12]} sells {have} pens at ${price}. How much is it?"
            lines.append(json.dumps({"question": question, "answer": worked}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tiny(tiny_encoder, reviews_csv, tmp_path) -> list[str]:
    """Overrides of a classification run that takes a second; results go to tmp_path/outputs."""
    return [
        "model=local", f"model.path={tiny_encoder}", "model.name=tiny",
        "data=table", f"data.path={reviews_csv}", "data.text_column=review",
        "data.label_column=verdict", "data.validation_share=0.2", "data.test_share=0.3",
        "training.steps=3", "training.batch_size=4", "lora.r=4", "calibration.samples=16",
        "runtime.device=cpu", f"paths.outputs={tmp_path}/outputs",
    ]  # fmt: skip


@pytest.fixture
def tiny_causal(tiny_decoder, tmp_path) -> list[str]:
    """The same for a language model."""
    return [
        "model=local", f"model.path={tiny_decoder}", "model.name=tiny", "data=chain_sum",
        "data.train_limit=32", "data.validation_limit=8", "data.test_limit=12",
        "training=causal", "training.steps=3", "training.max_length=32",
        "training.generate_limit=8", "lora.r=4", "calibration.samples=16",
        "runtime.device=cpu", f"paths.outputs={tmp_path}/outputs",
    ]  # fmt: skip


@pytest.fixture
def command(monkeypatch, capsys):
    """`command("-m", "seed=0,1")` is that command line, in this process: status, out, err."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        status = 0
        try:
            train.main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        if isinstance(status, str):  # what the interpreter does with it
            return 1, printed.out, printed.err + status
        return status, printed.out, printed.err

    return run
