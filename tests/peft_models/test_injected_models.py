"""Models that hold PEFT's layers without a PeftModel, such as transformers' after add_adapter."""

import copy
import pickle

import peft
import peft.functional
import pytest
import torch
from measures import assert_gap, assert_unchanged, snapshot, train
from methods import SPECS
from models import data_of, llama, token_batches
from torch import nn

from lora_init import (
    LoraConfig,
    LoraModel,
    get_peft_model,
    initialize_peft_model,
    load_peft_checkpoint,
    restore_peft_model,
    save_peft_model,
)
from lora_init.peft_models.layers import adapted_layers
from lora_init.peft_models.start import records

TARGETS = ["q_proj", "down_proj"]
EXACT = 4e-6  # in the logits of two layers, with PiSSA's ‖s B0 A0‖ of up to twice ‖W‖


def settings(targets=TARGETS, **others):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets} | others)


def injected(base=None, **others):
    model = base or llama()
    model.add_adapter(settings(**others))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**token_batches()[0]).logits


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(12, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("method", ["pissa", "orthogonal", "eva", "loftq"])
def test_the_factors_are_ours_and_restoring_undoes_them(method):
    batches = data_of(SPECS[method], token_batches())
    base, model = llama(), injected()
    before, expected = snapshot(model), logits(base)
    report = initialize_peft_model(model, method, calibration=batches)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=method)
    ours = get_peft_model(llama(), config, calibration=batches)
    assert [row.name for row in report.layers] == list(ours.layers)
    for layer in adapted_layers(model, "default"):
        assert torch.equal(layer.matrix("lora_A"), ours.layers[layer.name].lora_A)
        assert torch.equal(layer.matrix("lora_B"), ours.layers[layer.name].lora_B)
    if method != "loftq":
        assert_gap(logits(train(model)), expected, 1)
        model.disable_adapters()
        assert_gap(logits(model), expected, EXACT)
        model.enable_adapters()
    restore_peft_model(model)
    assert_gap(logits(model), expected, 1e-6)
    assert not records(model)
    assert snapshot(model).keys() == before.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_is_the_base_model(dtype):
    base = llama().to(dtype)
    expected = logits(base)
    model = injected(copy.deepcopy(base))
    report = initialize_peft_model(model, "pissa", verify=token_batches()[0])
    assert_gap(logits(model), expected, EXACT if dtype is torch.float32 else 0.02)
    state = {"edited"} if dtype is torch.float32 else {"in_forward"}
    assert {row.base for row in report.layers} == state


@pytest.mark.parametrize("use_rslora", [False, True])
def test_transformers_saves_for_the_original_base(tmp_path, use_rslora):
    model = injected(use_rslora=use_rslora, rank_pattern={"down_proj": 2})
    initialize_peft_model(model, "pissa")
    expected = logits(train(model))
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].r == 4  # only its file has rank 2r
    loaded = llama()
    loaded.load_adapter(tmp_path)
    assert_gap(logits(loaded.eval()), expected, EXACT)
    for library in (peft.PeftModel, LoraModel):
        assert_gap(logits(library.from_pretrained(llama(), tmp_path).eval()), expected, EXACT)


@pytest.mark.parametrize("method", ["pissa", "loftq", "orthogonal"])
def test_our_own_file_continues_the_training(tmp_path, method):
    model = injected()
    initialize_peft_model(model, method)
    expected = logits(train(model))
    save_peft_model(model, tmp_path)
    fresh = injected()
    load_peft_checkpoint(fresh, tmp_path)
    assert_gap(logits(fresh), expected, EXACT)
    assert_gap(logits(LoraModel.from_pretrained(llama(), tmp_path)), expected, EXACT)


def test_a_replaced_base_is_not_saved_as_a_plain_adapter(tmp_path):
    model = injected()
    initialize_peft_model(model, "loftq")
    with pytest.raises(ValueError, match="save_peft_model"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="save_peft_model"):
        model.peft_config["default"].to_dict()


def test_one_configuration_can_adapt_two_models(tmp_path):
    config, models = settings(), [llama(), llama()]
    for model in models:
        model.add_adapter(config)
    initialize_peft_model(models[0], "pissa")
    assert config.to_dict()["r"] == models[1].peft_config["default"].to_dict()["r"] == 4
    models[1].save_pretrained(tmp_path)
    assert_gap(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(llama()), 1e-6)


def test_any_module_with_injected_layers_is_initialized(tmp_path):
    x, base = torch.randn(5, 12), Network()
    model = peft.inject_adapter_in_model(settings(["inner"]), Network())
    initialize_peft_model(model, "pissa", verify=[x])
    state = peft.get_peft_model_state_dict(train(model))
    assert state["inner.lora_A.weight"].shape == (8, 12)
    expected = model(x)
    other = peft.inject_adapter_in_model(settings(["inner"], r=8, lora_alpha=16), Network())
    peft.set_peft_model_state_dict(other, state)
    assert_gap(other(x), expected, 1e-6)
    peft.set_peft_model_state_dict(model, state)  # it is split again
    assert_gap(model(x), expected, 1e-6)
    assert_gap(pickle.loads(pickle.dumps(copy.deepcopy(model)))(x), expected, 1e-6)
    peft.functional.delete_adapter(model, "default", "lora_")
    assert_gap(model(x), base(x), 1e-6)


def test_only_the_named_adapter_changes():
    model = injected()
    model.add_adapter(settings(), "other")
    model.set_adapter("default")
    with pytest.raises(ValueError, match="holds the adapter 'other' too"):
        initialize_peft_model(model, "pissa")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    initialize_peft_model(model, "orthogonal", adapter_name="other")
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(".other." in key for key in changed)
    with pytest.raises(ValueError, match="must be one of default, other"):
        initialize_peft_model(model, "pissa", adapter_name="third")


def test_an_adapter_of_other_layers_does_not_get_the_start(tmp_path):
    model, expected = llama(), logits(llama())
    model.add_adapter(settings(["o_proj"]), "other")
    model.add_adapter(settings(["q_proj"]), "default")
    initialize_peft_model(model, "pissa")
    train(model)
    model.set_adapter("other")
    assert_gap(logits(model), expected, EXACT)
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert_gap(logits(loaded), logits(model), EXACT)


def test_other_adapters_are_refused_on_a_changed_base(tmp_path):
    injected().save_pretrained(tmp_path)
    model = injected()
    initialize_peft_model(model, "pissa")
    expected = logits(model)
    before = snapshot(model)
    calls = [
        lambda: model.add_adapter(settings(), "other"),
        lambda: model.load_adapter(tmp_path, "other"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="changed the base"):
            call()
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="changed the base"):
        peft.inject_adapter_in_model(settings(), model, "other")
    assert_gap(logits(model), expected, 0)


def test_deleting_the_adapter_restores_the_base():
    expected, model = logits(llama()), injected()
    initialize_peft_model(model, "pissa")
    train(model).delete_adapter("default")
    assert_gap(logits(model), expected, 1e-6)
    model.add_adapter(settings())
    initialize_peft_model(model, "olora")
    assert_gap(logits(model), expected, EXACT)


def test_other_models_are_refused():
    wrapped = peft.get_peft_model(llama(), settings())
    for model in (llama(), wrapped.base_model, object()):
        with pytest.raises(TypeError, match="model.add_adapter"):
            initialize_peft_model(model, "pissa")
