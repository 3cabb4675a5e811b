"""A LoraModel in sentence-transformers: inside of one, around one, and in its trainer."""

import numpy as np
import pytest
import torch
from measures import train
from models import VOCABULARY
from products import chosen
from transformers import BertConfig, BertModel, BertTokenizerFast

from lora_init import (
    LoraConfig,
    LoraModel,
    get_peft_model,
    initialize_peft_model,
    restore_peft_model,
)

library = pytest.importorskip("sentence_transformers")
models = pytest.importorskip("sentence_transformers.models")
losses = pytest.importorskip("sentence_transformers.losses")
datasets = pytest.importorskip("datasets")

SENTENCES = ["w1 w2 w3", "w4 w5", "w6 w7 w1", "w8 w9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{index}" for index in range(VOCABULARY - len(words))]
    (made / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(made / "vocab.txt")).save_pretrained(made)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=80, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(made)
    return made


def embedder(folder):
    transformer = models.Transformer(str(folder))
    modules = [transformer, models.Pooling(48)]
    return library.SentenceTransformer(modules=modules, device="cpu")


CONFIG = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights="pissa")


def around(made):
    model = get_peft_model(made, CONFIG)
    return model, model


def inside(made):
    return get_peft_model(made[0].auto_model, CONFIG), made


def put_in_place(made):
    model = get_peft_model(made[0].auto_model, CONFIG)
    made[0].model = model
    return model, made


@pytest.mark.parametrize("injected", chosen([around, inside, put_in_place], inside))
def test_it_trains_and_saves_the_adapter(injected, folder, tmp_path):
    base = embedder(folder).encode(SENTENCES)
    model, trained = injected(embedder(folder))
    np.testing.assert_allclose(trained.encode(SENTENCES), base, atol=1e-5)
    pairs = {"anchor": SENTENCES * 2, "positive": [text[:5] for text in SENTENCES] * 2}
    arguments = library.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, logging_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = library.SentenceTransformerTrainer(
        trained, arguments, train_dataset=datasets.Dataset.from_dict(pairs),
        loss=losses.MultipleNegativesRankingLoss(trained),
    )  # fmt: skip
    trainer.train()
    expected = trained.encode(SENTENCES)
    assert np.abs(expected - base).max() > 1e-3
    for saved in (tmp_path / "checkpoint-3", tmp_path / "final"):
        if saved.name == "final":
            trainer.save_model(str(saved))
        assert (saved / "adapter_config.json").is_file()
        fresh = embedder(folder)
        LoraModel.from_pretrained(fresh if injected is around else fresh[0].auto_model, saved)
        np.testing.assert_allclose(fresh.encode(SENTENCES), expected, atol=1e-5)
    if injected is not around:
        reopened = library.SentenceTransformer(str(tmp_path / "final"), device="cpu")
        np.testing.assert_allclose(reopened.encode(SENTENCES), expected, atol=1e-5)
    model.unload()
    np.testing.assert_allclose(embedder(folder).encode(SENTENCES), base, atol=1e-5)


def test_an_injected_adapter_starts_and_is_saved(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = embedder(folder)
    expected = model.encode(SENTENCES)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["query", "value"]))
    initialize_peft_model(model, "pissa")
    np.testing.assert_allclose(model.encode(SENTENCES), expected, atol=1e-5)
    train(model)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = embedder(folder)
    loaded.load_adapter(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.encode(SENTENCES), model.encode(SENTENCES), atol=1e-5)
    assert abs(model.encode(SENTENCES) - expected).max() > 1e-3
    restore_peft_model(model)
    np.testing.assert_allclose(model.encode(SENTENCES), expected, atol=1e-5)
