"""Models: checked, quiet, and with a head that depends on its own seed alone."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from experiments.config.inputs import ModelConfig
from experiments.errors import ConfigurationError
from experiments.models import checkpoint_activations, load_model, minilm, smollm2
from experiments.models.local import LocalModel, locate
from experiments.models.minilm import MiniLM
from experiments.models.pretrained import newly_drawn, set_dropout
from experiments.models.source import Checkpoint

CLASSES = {"task_type": "SEQ_CLS", "labels": ("rotten", "fresh")}


def test_the_head_depends_on_its_seed_alone(tiny_encoder):
    config = LocalModel(path=str(tiny_encoder))
    heads = []
    for seed, elsewhere in ((1, 10), (1, 20), (2, 20)):
        torch.manual_seed(elsewhere)
        state = torch.get_rng_state()
        heads.append(load_model(config, **CLASSES, head_seed=seed).model.classifier.weight)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_loading_is_quiet(tiny_encoder, capfd):
    loaded = load_model(LocalModel(path=str(tiny_encoder)), **CLASSES, head_seed=0)
    assert "".join(capfd.readouterr()) == ""
    assert loaded.notes == ()
    assert loaded.model.config.id2label == {0: "rotten", 1: "fresh"}


def test_a_part_missing_below_the_head_is_said(tiny_encoder, tmp_path, caplog):
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(tiny_encoder, add_pooling_layer=False).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = load_model(LocalModel(path=str(tmp_path)), **CLASSES, head_seed=0)
    assert "bert.pooler.dense.weight" in loaded.notes[0]
    assert "random, not pretrained" in caplog.text
    assert newly_drawn(loaded.model, ["classifier.weight"]) == ()


def test_dropout_is_set_everywhere(tiny_encoder, tiny_decoder):
    from transformers import AutoConfig, GPT2Config

    for config in (
        AutoConfig.from_pretrained(tiny_encoder),
        AutoConfig.from_pretrained(tiny_decoder),
        GPT2Config(),
    ):
        set_dropout(config, 0.25)
        rates = [v for k, v in config.to_dict().items() if "dropout" in k or k.endswith("_pdrop")]
        assert rates
        assert all(rate == 0.25 for rate in rates if not isinstance(rate, (bool, str)))
    model = load_model(LocalModel(path=str(tiny_encoder)), **CLASSES, head_seed=0).model
    assert all(m.p == 0.0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    kept = LocalModel(path=str(tiny_encoder), dropout=None)
    model = load_model(kept, **CLASSES, head_seed=0).model
    assert any(m.p == 0.1 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_minilm_is_the_real_one():
    loaded = load_model(MiniLM(), **CLASSES, head_seed=0)
    # The head's 2 x 384 + 2 come on top of the 22,713,216 pretrained parameters.
    assert sum(p.numel() for p in loaded.model.parameters()) == 22_713_216 + 770
    ids = loaded.tokenizer("A fine film.")["input_ids"]
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == "a fine film."


def test_other_weights_than_minilms_are_refused(monkeypatch):
    minilm.folder.cache_clear()
    monkeypatch.setattr(minilm, "sha256", lambda path: "0" * 64)
    with pytest.raises(ConfigurationError, match=f"sha256 {'0' * 64}, expected {'53aa5117'}"):
        load_model(MiniLM(), **CLASSES, head_seed=0)
    minilm.folder.cache_clear()


def test_an_encoder_does_not_generate():
    with pytest.raises(ConfigurationError, match=r"minilm is BertModel.*model=smollm2"):
        load_model(MiniLM(), task_type="CAUSAL_LM", labels=(), head_seed=0)


def test_a_decoder_classifies(tiny_decoder):
    model = load_model(LocalModel(path=str(tiny_decoder)), **CLASSES, head_seed=0).model
    batch = {"input_ids": torch.tensor([[3, 4, 0], [5, 6, 7]])}
    assert model(**batch).logits.shape == (2, 2)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/model", r"model.path='/nowhere/model': no such folder"),
        ("./absent", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_a_wrong_path_is_named(path, message):
    with pytest.raises(ConfigurationError, match=message):
        locate(LocalModel(path=path))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"has no config\.json"):
        locate(LocalModel(path=str(tmp_path)))


def test_a_folder_that_transformers_cannot_load_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ConfigurationError, match="cannot load"):
        load_model(LocalModel(path=str(tmp_path), name="mine"), **CLASSES, head_seed=0)


def test_a_hub_name_is_passed_on():
    config = LocalModel(path="organisation/model", revision="main", notes=["mine"])
    assert locate(config) == Checkpoint("organisation/model", "main", notes=("mine",))
    assert isinstance(config, ModelConfig)


@pytest.fixture
def conversion(monkeypatch, tmp_path):
    """A stand-in for the GGUF file and its conversion; counts the conversions."""
    source = tmp_path / "model.gguf"
    source.write_bytes(b"four-bit values")
    calls = []

    def convert(gguf, target):
        calls.append(gguf)
        (target / "model.safetensors").write_bytes(b"float32 values")

    monkeypatch.setattr(smollm2, "packaged", lambda *arguments: source)
    monkeypatch.setattr(smollm2, "convert", convert)

    def folder():
        smollm2.converted_folder.cache_clear()
        return smollm2.converted_folder(tmp_path / "cache")

    yield folder, calls
    smollm2.converted_folder.cache_clear()


def test_a_conversion_is_kept_and_checked(conversion, tmp_path):
    folder, calls = conversion
    first = folder()
    manifest = json.loads((first / "manifest.json").read_text())
    assert list(manifest["files"]) == ["model.safetensors"]
    assert folder() == first
    assert len(calls) == 1

    (first / "model.safetensors").write_bytes(b"damaged")
    assert (folder() / "model.safetensors").read_bytes() == b"float32 values"
    (first / "manifest.json").unlink()  # as a killed conversion would leave it
    folder()
    assert len(calls) == 3
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


def test_a_failed_conversion_leaves_nothing(conversion, monkeypatch, tmp_path):
    folder, _ = conversion

    def fail(source, target):
        (target / "half").write_bytes(b"x")
        raise RuntimeError("killed")

    monkeypatch.setattr(smollm2, "convert", fail)
    with pytest.raises(RuntimeError, match="killed"):
        folder()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "lora_init" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.cache_folder().parts[-3:] == (".cache", "lora_init", "models")


def test_a_base_in_sixteen_bits(tiny_decoder):
    config = LocalModel(path=str(tiny_decoder), dtype="bfloat16")
    model = load_model(config, task_type="CAUSAL_LM", labels=(), head_seed=0).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigurationError, match=r"model\.dtype='bf16'.*did you mean 'bfloat16'"):
        load_model(LocalModel(path=str(tiny_decoder), dtype="bf16"), **CLASSES, head_seed=0)


def test_a_quantised_layer_computes_in_the_bases_dtype():
    from experiments.models.quantization import loading_arguments

    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        settings = loading_arguments("nf4", "CAUSAL_LM", name)["quantization_config"]
        assert settings.bnb_4bit_compute_dtype == dtype
    assert loading_arguments("int8", "CAUSAL_LM", "bfloat16")["quantization_config"].load_in_8bit


def test_checkpointed_blocks_still_generate_with_a_cache(tiny_decoder):
    loaded = load_model(
        LocalModel(path=str(tiny_decoder)), task_type="CAUSAL_LM", labels=(), head_seed=0
    )
    model, prompt = loaded.model.eval(), torch.tensor([[5, 6, 7]])
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    checkpoint_activations(model)
    lengths = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)
    assert lengths == [3, 1, 1, 1, 1]
