"""A trained core between frozen factors: every station of an adapter's life."""

import copy
import shutil
import warnings

import peft
import pytest
import torch
from measures import logits, relative_gap, train
from models import data_of, llama, token_batches
from networks import Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_init import (
    LoraConfig,
    LoraModel,
    get_peft_model,
    initialize_peft_model,
    list_initializers,
    load_peft_checkpoint,
    reinitialize,
)

FILE, CORES = "adapter_model.safetensors", "lora_init_core.safetensors"
TARGETS = ["q_proj", "v_proj", "down_proj"]
SETTINGS = {"plain": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def adapted(method="lora_xs", base=None, **settings):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=method, **settings
    )
    (spec,) = list_initializers(method)
    base = llama() if base is None else base
    return train(get_peft_model(base, config, calibration=data_of(spec, token_batches())), size=0.3)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d", "Embedding", "Linear4bit"])
@every_setting
def test_the_layer_computes_its_formula(kind, settings):
    """h = base(x) + s B R A x, by a dense float64 product; only the core is trained."""
    case = Case(kind)
    base = case.build()
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=list(case.shapes), init_lora_weights="lora_xs", **settings
    )
    model = train(get_peft_model(copy.deepcopy(base), config), size=0.3)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_core"} | (
        {"lora_magnitude_vector"} if "use_dora" in settings else set()
    )
    for name, layer in model.layers.items():
        x = case.layer_inputs(name)
        B, R, A = (p.detach().double() for p in (layer.lora_B, layer.lora_core, layer.lora_A))
        delta = layer.scaling * B @ R @ A
        assert relative_gap(layer.delta_weight(), delta) < 1e-6
        expected = copy.deepcopy(layer).base_layer
        if kind != "Linear4bit" and not settings.get("use_dora"):
            stored = delta.T if kind in ("Conv1D", "Embedding") else delta
            with torch.no_grad():
                expected.weight += stored.view(expected.weight.shape).float()
            assert relative_gap(layer(x), expected(x)) < 1e-5
        layer(x).square().sum().backward()
        assert layer.lora_core.grad.any()
        assert layer.lora_A.grad is None
        assert layer.lora_B.grad is None


@every_setting
def test_disable_merge_unmerge_and_unload(settings):
    base, batches = llama(), token_batches()
    original = logits(base, batches)
    model = adapted(base=copy.deepcopy(base), **settings)
    trained = logits(model, batches)
    assert relative_gap(trained, original) > 1e-3
    with model.disable_adapter():
        assert relative_gap(logits(model, batches), original) == 0
    model.merge_adapter()
    assert relative_gap(logits(model, batches), trained) < 1e-5
    model.unmerge_adapter()
    assert relative_gap(logits(model, batches), trained) == 0
    assert model.init_report().layers[0].relative_norm > 0
    merged = copy.deepcopy(model).merge_and_unload()
    assert relative_gap(logits(merged, batches), trained) < 1e-5
    assert relative_gap(logits(model.unload(), batches), original) == 0


@every_setting
@pytest.mark.parametrize("method", ["lora_xs", "lora_sb"])
def test_files_are_a_plain_adapter_and_the_core_is_trained_again(method, settings, tmp_path):
    model, batches = adapted(method, **settings), token_batches()
    trained = logits(model, batches)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / FILE).keys()
    assert not any("core" in key for key in keys)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert relative_gap(logits(theirs, batches), trained) < 1e-6
    ours = LoraModel.from_pretrained(llama(), tmp_path)
    assert relative_gap(logits(ours, batches), trained) < 1e-6
    for name, layer in ours.layers.items():
        for part in ("lora_A", "lora_B", "lora_core"):
            assert torch.equal(getattr(layer, part), getattr(model.layers[name], part))
    assert ours.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert ours.peft_config.init_lora_weights["name"] == method
    train(ours, seed=8).save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(llama(), tmp_path, is_trainable=False)
    assert relative_gap(logits(again, batches), logits(ours, batches)) < 1e-6


def test_checkpoints_resume_exactly():
    model, batches = adapted(), token_batches()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert sum(key.endswith("lora_core") for key in state) == len(model.layers)
    other = get_peft_model(llama(), model.peft_config, seed=5)
    other.load_state_dict(state)
    assert relative_gap(logits(other, batches), logits(model, batches)) == 0
    steps = []
    for one in (model, other):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        one(**batches[0]).logits.square().mean().backward()
        optimizer.step()
        steps.append(logits(one, batches))
    assert relative_gap(*steps) == 0
    plain = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    with pytest.raises(ValueError, match="only in"):
        plain.load_state_dict(state)


def test_reinitialize_to_and_from_a_core():
    base, batches = llama(), token_batches()
    original = logits(base, batches)
    pissa = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa")
    model = reinitialize(adapted(base=base), pissa)
    assert relative_gap(logits(model, batches), original) < 1e-5
    again = reinitialize(
        model, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="lora_xs")
    )
    assert all(layer.lora_core is not None for layer in again.layers.values())
    assert relative_gap(logits(again.unload(), batches), original) < 1e-5


def test_a_portable_file_is_a_plain_adapter(tmp_path):
    model, batches = adapted(), token_batches()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, portable=True)
    assert not (tmp_path / CORES).exists()  # that of the first save
    loaded = LoraModel.from_pretrained(llama(), tmp_path)
    assert relative_gap(logits(loaded, batches), logits(model, batches)) < 1e-6
    assert all(layer.lora_core is None for layer in loaded.layers.values())


# -- damaged and foreign files ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    adapted().save_pretrained(folder)
    return folder


def loaded(folder):
    return LoraModel.from_pretrained(llama(), folder)


def test_without_the_second_file_it_is_a_plain_adapter(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / CORES).unlink()
    with pytest.warns(UserWarning, match="is missing in.*plain LoRA.*Copy this file too"):
        plain = loaded(tmp_path)
    assert (
        relative_gap(logits(plain, token_batches()), logits(loaded(saved), token_batches())) < 1e-6
    )
    assert all(layer.lora_A.requires_grad for layer in plain.layers.values())


def test_files_of_two_saves_are_not_combined(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    train(loaded(saved), seed=9).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / CORES, tmp_path / CORES)
    with pytest.raises(ValueError, match="checksum differs.*folder of one save"):
        loaded(tmp_path)
    (tmp_path / CORES).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        loaded(tmp_path)


def test_factors_that_were_changed_after_saving_are_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / FILE)
    key = next(key for key in tensors if "lora_B" in key)
    save_file(tensors | {key: 2 * tensors[key]}, tmp_path / FILE, metadata=metadata)
    with pytest.raises(ValueError, match="B R of.*changed after it was saved"):
        loaded(tmp_path)


def test_peft_models_refuse_a_core_by_name(saved):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(ValueError, match="'lora_xs' is not supported for a PEFT model.*core"):
        initialize_peft_model(model, "lora_xs")
    with pytest.raises(ValueError, match="lora_xs trains a core.*from_pretrained"):
        load_peft_checkpoint(model, saved)
