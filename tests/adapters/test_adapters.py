"""Damaged, foreign or incomplete adapter files are refused by name; the base is unchanged."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(4)

WEIGHTS = "adapter_model.safetensors"


def bert(seed=0, hidden_size=16):
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=30,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def trained(method="pissa", **settings):
    settings = {"r": 4, "lora_alpha": 8, "task_type": "SEQ_CLS"} | settings
    model = get_peft_model(bert(), LoraConfig(init_lora_weights=method, **settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


IDS = torch.arange(24).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def folder(tmp_path):
    trained().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def refused(folder):
    def call(match, error=ValueError, base=None):
        base = base or bert()
        state = {key: value.clone() for key, value in base.state_dict().items()}
        with pytest.raises(error, match=match):
            LoraModel.from_pretrained(base, folder)
        assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())

    return call


@pytest.mark.parametrize("method", ["kaiming", "pissa", "loftq"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_trained_head_and_adapter_load_as_trainable(tmp_path, method, use_rslora):
    model = trained(method, use_rslora=use_rslora, rank_pattern={"query": 2})
    model.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(bert(seed=0), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags
    ranks = {name: layer.rank for name, layer in loaded.layers.items()}
    assert ranks == {name: layer.rank for name, layer in model.layers.items()}
    frozen = LoraModel.from_pretrained(bert(seed=0), tmp_path, is_trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("method", ["kaiming", "pissa", "qpissa"])
@pytest.mark.parametrize(
    "variant",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"target_modules": ["query", "word_embeddings"], "use_dora": True},
    ],
    ids=["dora", "lora_bias", "bias-all", "bias-lora_only", "embedding-dora"],
)
def test_every_variant_loads_as_trainable(tmp_path, method, variant):
    model = trained(method, **variant)
    model.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(bert(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags
    ours, theirs = loaded.state_dict(), model.state_dict()
    if method == "pissa":  # a kept or replaced base no longer needs its initial factors
        assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(value, theirs[key]) for key, value in ours.items() if "initial" not in key
    )
    loaded.save_pretrained(tmp_path / "again")
    (first,), (second,) = (list(f.glob("*.safetensors")) for f in (tmp_path, tmp_path / "again"))
    first, second = contents(first)[0], contents(second)[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ({"use_dora": True}, f"{QUERY}.lora_magnitude_vector"),
        ({"lora_bias": True}, f"{QUERY}.lora_B.bias"),
        ({"bias": "lora_only"}, f"{QUERY}.base_layer.bias"),
        ({"bias": "all"}, "base_model.model.bert.pooler.dense.bias"),
    ],
    ids=["dora", "lora_bias", "bias-lora_only", "bias-all"],
)
def test_a_missing_or_surplus_part_of_a_variant_is_refused(tmp_path, variant, key):
    trained("pissa", **variant).save_pretrained(tmp_path)
    tensors, metadata = contents(tmp_path / WEIGHTS)
    part = tensors.pop(key)
    save_file(tensors, tmp_path / WEIGHTS, metadata=metadata)
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        LoraModel.from_pretrained(bert(), tmp_path)
    trained("pissa").save_pretrained(tmp_path)
    tensors, metadata = contents(tmp_path / WEIGHTS)
    save_file(tensors | {key: part}, tmp_path / WEIGHTS, metadata=metadata)
    with pytest.raises(ValueError, match=f"contains '{key}'"):
        LoraModel.from_pretrained(bert(), tmp_path)


def test_a_subtracted_adapter_is_written_for_the_original_base(folder):
    tensors, metadata = contents(folder / WEIGHTS)
    assert metadata["format"] == "pt"
    lora_A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    assert tensors[lora_A].shape == (8, 16)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    assert config["inference_mode"] is True
    assert config["modules_to_save"] == ["classifier"]


def test_a_truncated_file_is_refused(folder, refused):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    refused("adapter_model.safetensors is damaged")
    (folder / WEIGHTS).write_bytes(b"not a file of tensors")
    refused("adapter_model.safetensors is damaged")


def test_a_missing_file_is_refused(folder, refused):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused("no adapter_model.safetensors.*a pickle, which is not supported", FileNotFoundError)
    (folder / "adapter_model.bin").unlink()
    refused("no adapter_model.safetensors", FileNotFoundError)
    (folder / "adapter_config.json").write_text("{")
    refused("not valid JSON")
    (folder / "adapter_config.json").write_text("[]")
    refused("must contain a JSON object")
    (folder / "adapter_config.json").unlink()
    refused("no adapter_config.json", FileNotFoundError)


KEY = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), "lacks '.*layer.1.attention.self.value.lora_B.weight'"),
        (lambda t: t.update({"base_model.model.extra": torch.ones(2)}), "contains '.*extra'"),
        (lambda t: t.update({KEY: torch.ones(3, 8)}), r"has shape \(3, 8\): must be \(16, 8\)"),
        (lambda t: t[KEY].fill_(float("nan")), "value.lora_B.weight' contains NaN"),
        (lambda t: t.pop("base_model.model.classifier.bias"), "lacks '.*classifier.bias'"),
        (lambda t: [t.pop(k) for k in list(t) if "lora_A" in k], "contains no lora_A"),
    ],
)
def test_a_tensor_that_is_missing_or_wrong_is_refused(folder, refused, change, message):
    tensors, metadata = contents(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    refused(message)


def test_the_adapter_of_another_base_is_refused(refused, folder):
    message = r"query.lora_A.weight' has shape \(8, 16\): must be .* this base model"
    refused(message, base=bert(hidden_size=32))
    refused("'bert.encoder.layer.0.*', which Linear does not", base=torch.nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="is not the one the adapter was trained on"):
        LoraModel.from_pretrained(bert(seed=1), folder)


def test_a_replaced_base_is_rebuilt_from_its_own_original_only(tmp_path):
    model = trained("loftq")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS).exists()
    with pytest.raises(ValueError, match="is not the one the adapter was trained on"):
        LoraModel.from_pretrained(bert(seed=1), tmp_path)


def test_another_method_in_the_same_folder_replaces_the_files(tmp_path):
    trained("loftq").save_pretrained(tmp_path)
    model = trained("kaiming")
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", WEIGHTS]
    loaded = LoraModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_an_interrupted_save_leaves_the_old_file(folder, monkeypatch):
    from lora_init.adapters import save

    before = (folder / WEIGHTS).read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(save, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        trained("olora").save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert len(list(folder.iterdir())) == 2
