"""Adapter files without some layers, with edits, or with tensors that are not factors."""

import json
import warnings

import peft
import pytest
import torch
from measures import assert_gap, assert_unchanged, logits, snapshot, train
from models import bert, llama, token_batches
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(4)

WEIGHTS = "adapter_model.safetensors"


def adapted(method="pissa", make=llama, **settings):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | settings
    return train(get_peft_model(make(), LoraConfig(init_lora_weights=method, **settings)))


def change_tensors(path, change):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def refused(folder, match, make=llama):
    base = make()
    before = snapshot(base)
    with pytest.raises(ValueError, match=match) as caught:
        LoraModel.from_pretrained(base, folder)
    assert str(folder) in str(caught.value)
    assert_unchanged(base, before)


# -- missing layers -----------------------------------------------------------------


def without(part):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if part in key]


@pytest.mark.parametrize("method", ["kaiming", "pissa", "loftq"])
@pytest.mark.parametrize("layer", ["layers.1.self_attn.q_proj", "layers.0.", "v_proj"])
def test_our_file_without_a_layer_is_refused(layer, method, tmp_path):
    adapted(method).save_pretrained(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    change_tensors(path, without(layer))
    refused(tmp_path, f"lacks all tensors of .*{layer}.*damaged or incomplete")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.(q_proj|v_proj)"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]},
        {"target_modules": ["q_proj", "v_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    ],
    ids=str,
)
def test_pefts_file_without_a_layer_is_loaded_with_a_warning(settings, tmp_path):
    model = train(peft.get_peft_model(llama(), peft.LoraConfig(r=4, **settings)))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel.from_pretrained(llama(), tmp_path)
    change_tensors(tmp_path / WEIGHTS, without("layers.1.self_attn.v_proj"))
    with pytest.warns(UserWarning, match="contains nothing for 'model.layers.1.self_attn.v_proj'"):
        ours = LoraModel.from_pretrained(llama(), tmp_path)
    model.base_model.model.model.layers[1].self_attn.v_proj.lora_B["default"].weight.data.zero_()
    assert_gap(logits(ours, token_batches()), logits(model, token_batches()), 1e-6)


# -- an edited configuration -------------------------------------------------------------------


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FOLLOWED = {
    "alpha": {"lora_alpha": 50},
    "to rslora": {"use_rslora": True},
    "alpha of a layer": {"alpha_pattern": {"layers.1.self_attn.q_proj": 1.5}},
    "rslora and alphas": {"use_rslora": True, "alpha_pattern": {"v_proj": 9}, "lora_alpha": 3},
    "how it is used": {"inference_mode": False, "lora_dropout": 0.25, "revision": "main"},
    "other metadata": {"peft_version": "0.99", "auto_mapping": {"a": 1}, "later": None},
}


@pytest.mark.parametrize(("method", "rslora"), [("kaiming", False), ("pissa", True)])
@pytest.mark.parametrize("values", FOLLOWED.values(), ids=FOLLOWED)
def test_an_edit_has_the_same_effect_as_in_peft(values, method, rslora, tmp_path):
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5}}
    model = adapted(method, use_rslora=rslora, **patterns)
    model.save_pretrained(tmp_path)
    edit(tmp_path, **values)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    ours = LoraModel.from_pretrained(llama(), tmp_path)
    assert_gap(logits(ours, token_batches()), logits(theirs, token_batches()), 2e-5)
    assert {layer.rank for layer in ours.layers.values()} == {2, 4}
    assert ours.peft_config.lora_dropout == values.get("lora_dropout", 0.0)
    ours.save_pretrained(tmp_path / "again")
    again = LoraModel.from_pretrained(llama(), tmp_path / "again")
    assert_gap(logits(again, token_batches()), logits(ours, token_batches()), 2e-5)
    assert_gap(logits_of_base(ours), logits(llama(), token_batches()), 2e-6)


def logits_of_base(model):
    with model.disable_adapter():
        return logits(model, token_batches())


CONTRADICTIONS = {
    "r": {"r": 4},
    "rank_pattern": {"rank_pattern": {"q_proj": 6}},
    "target_modules": {"target_modules": ["q_proj"]},
    "target_modules=.*exclude_modules": {"exclude_modules": ["layers.0.self_attn.v_proj"]},
    "target_modules=.*layers_to_transform": {"layers_to_transform": [1]},
    "use_dora=True": {"use_dora": True},
    "lora_bias=True": {"lora_bias": True},
    "bias='all'": {"bias": "all"},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "modules_to_save": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_an_edit_that_contradicts_the_adapter_is_refused_by_name(name, tmp_path):
    adapted().save_pretrained(tmp_path)
    edit(tmp_path, **CONTRADICTIONS[name])
    refused(tmp_path, f"{name}.*contradicts the adapter")


@pytest.mark.parametrize("values", [{"lora_alpha": 50}, {"use_rslora": True}], ids=str)
def test_the_scaling_of_a_replaced_base_is_not_edited(values, tmp_path):
    adapted("loftq").save_pretrained(tmp_path)
    edit(tmp_path, **values)
    refused(tmp_path, "base of this adapter depends on the original scaling")


# -- tensors that are not factors ---------------------------------------------------------------

DTYPES = [
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
KINDS = {
    "ours": (lambda: adapted("pissa"), llama, "q_proj.lora_A.weight"),
    "the recipe of a base": (lambda: adapted("loftq"), llama, "replacement_B"),
    "a head": (
        lambda: adapted("kaiming", bert, target_modules=["query"], task_type="SEQ_CLS"), bert,
        "classifier.weight",
    ),
    "a bias": (
        lambda: adapted("kaiming", bert, target_modules=["query"], bias="all"), bert, "dense.bias",
    ),
    "a magnitude": (lambda: adapted("pissa", use_dora=True), llama, "lora_magnitude_vector"),
    "PEFT's": (
        lambda: peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])),
        llama, "lora_B.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "base", "part"), KINDS.values(), ids=KINDS)
def test_a_trained_tensor_must_be_a_float(make, base, part, tmp_path):
    make().save_pretrained(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    key, value = next(item for item in load_file(path).items() if item[0].endswith(part))
    for dtype in DTYPES:
        change_tensors(path, lambda tensors, to=dtype: tensors.update({key: value.to(to)}))
        refused(tmp_path, f"{key}' has dtype {dtype}, which is not supported", base)
