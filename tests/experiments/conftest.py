"""Compositions, and models small enough that a run takes a second."""

from __future__ import annotations

import copy
import functools
import gc
import re
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from substitutes import random_llama, word_tokenizer, write_word_problems

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # experiments/ is an application: it is run from here, not installed

from experiments import train  # noqa: E402
from experiments.config.resolve import resolve  # noqa: E402
from experiments.config.store import register_schemas  # noqa: E402

register_schemas()


GROUPS = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}


loaded = 0
"""Modules that were there when garbage was last collected for good."""


@pytest.fixture(autouse=True)
def loaded_stays():
    """Every run collects garbage, and a tenth of a second of that goes through modules that the
    first ones have loaded: those are put where collections pass them by."""
    global loaded
    yield
    if len(sys.modules) > loaded + 20:
        loaded = len(sys.modules)
        gc.collect()
        gc.freeze()


@functools.cache
def composition(config: str, overrides: tuple[str, ...]):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(config, overrides=list(overrides))


@pytest.fixture(scope="session")
def whole_composition():
    """What Hydra makes of a primary configuration and overrides: `composition(name, overrides)`."""
    return composition


@functools.cache
def parsed(override: str):
    return OverridesParser.create().parse_override(override)


def is_a_value(override: str) -> bool:
    """Whether it sets a value, which Hydra does last, and chooses no file."""
    key = re.match(r"([a-z]\w*)((?:\.\w+)*)=", override)
    return bool(key) and key[1] != "hydra" and (bool(key[2]) or key[1] not in GROUPS)


@pytest.fixture
def composed():
    """`composed("init=pissa", config="train")` is what Hydra makes of these overrides.

    To put the files together takes it a quarter of a second: that is done once for equal choices,
    and its own function for what comes after, the single values, is called with a copy.
    """

    def build(*overrides: str, config: str = "train"):
        values = [parsed(override) for override in overrides if is_a_value(override)]
        choices = tuple(override for override in overrides if not is_a_value(override))
        made = copy.deepcopy(composition(config, choices))
        ConfigLoaderImpl._apply_overrides_to_config(values, made)
        return made

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
    return write_word_problems(tmp_path_factory.mktemp("word-problems"))


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
