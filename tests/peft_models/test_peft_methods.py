"""PEFT's own methods and functions on an initialized model: correct, or refused by name."""

import copy
import io

import peft
import pytest
import torch
from measures import assert_gap, assert_unchanged, logits, snapshot, train
from models import llama, token_batches
from networks import Case
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from lora_init import (
    LoraConfig,
    get_peft_model,
    initialize_peft_model,
    load_peft_checkpoint,
    restore_peft_model,
)
from lora_init.peft_models.layers import adapted_layers

pytestmark = pytest.mark.sampled(3)

TARGETS = ["square", "tall", "wide"]
DTYPES = [torch.float32, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["edited", "in forward"])


def wrapped(dtype=torch.float32, r=4, **settings):
    settings = {"r": r, "lora_alpha": 2 * r, "target_modules": TARGETS} | settings
    return peft.get_peft_model(Case("Linear", dtype).build(), peft.LoraConfig(**settings)).eval()


def started(dtype=torch.float32, method="pissa", **settings):
    model = wrapped(dtype, **settings)
    initialize_peft_model(model, method)
    return train(model)


def original(dtype=torch.float32):
    return outputs(Case("Linear", dtype).build(), dtype)


def outputs(model, dtype=torch.float32):
    with torch.no_grad():
        return model(Case("Linear", dtype).inputs())


def exact(dtype):
    return 2e-5 if dtype is torch.float32 else 0.02


# -- what leaves the process -----------------------------------------------------------------------


@pytest.mark.parametrize("state", ["inferred", "given", "renamed adapter"])
@by_dtype
def test_the_adapters_state_dict_is_for_the_original_base(dtype, state):
    model = started(dtype)
    expected = outputs(model, dtype)
    given = {"state_dict": model.state_dict()} if state == "given" else {}
    adapter = get_peft_model_state_dict(model, **given)
    assert {tensor.shape[0] for key, tensor in adapter.items() if "lora_A" in key} == {8}
    other = wrapped(dtype, r=8)
    name = "default"
    if state == "renamed adapter":
        name = "synchronized"
        other.add_adapter(name, other.peft_config["default"])
        other.set_adapter(name)
    set_peft_model_state_dict(other, adapter, adapter_name=name)
    assert_gap(outputs(other.eval(), dtype), expected, exact(dtype))


@by_dtype
def test_the_models_state_dict_is_for_the_original_base(dtype):
    """Accelerate's save_model and torch.save write this state."""
    model = started(dtype)
    expected = outputs(model, dtype)
    memory = io.BytesIO()
    torch.save(model.state_dict(), memory)
    memory.seek(0)
    state = torch.load(memory)
    other = wrapped(dtype, r=8)
    other.load_state_dict(state)
    assert_gap(outputs(other, dtype), expected, exact(dtype))
    base = Case("Linear", dtype).build().state_dict()
    for name in TARGETS:
        weight = state[f"base_model.model.{name}.base_layer.weight"]
        assert_gap(weight, base[f"{name}.weight"], 1e-6)


@by_dtype
def test_loading_a_state_dict_is_exact(dtype):
    model = started(dtype)
    expected, state = outputs(model, dtype), copy.deepcopy(model.state_dict())
    adapter = get_peft_model_state_dict(copy.deepcopy(model))
    for load in (
        lambda: model.load_state_dict(state),
        lambda: set_peft_model_state_dict(model, adapter),
    ):
        train(model, seed=6)
        load()
        assert torch.equal(outputs(model, dtype), expected)


@pytest.mark.parametrize("wrong", ["plain", "another start"])
@by_dtype
def test_a_state_of_another_start_is_refused(dtype, wrong):
    model = started(dtype)
    if wrong == "plain":
        adapter, match = get_peft_model_state_dict(train(wrapped(dtype))), "has rank 4"
    else:
        adapter, match = get_peft_model_state_dict(started(dtype, "olora")), "another start"
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        set_peft_model_state_dict(model, adapter)
    assert_unchanged(model, before)


def test_the_state_dict_of_an_adapter_with_a_replaced_base_is_refused():
    model = started(method="loftq")
    with pytest.raises(ValueError, match="get_peft_model_state_dict is not supported"):
        get_peft_model_state_dict(model)
    state = copy.deepcopy(model.state_dict())
    other = wrapped()
    other.load_state_dict(state)  # with its base
    assert torch.equal(outputs(other), outputs(model))
    restore_peft_model(model)
    get_peft_model_state_dict(model)


@by_dtype
def test_swapping_factors_under_a_changed_base_is_refused(dtype, tmp_path):
    model = started(dtype)
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match="hotswap_adapter is not supported"):
        hotswap_adapter(model, str(tmp_path), "default")
    assert_unchanged(model, before)


@by_dtype
def test_a_restored_model_has_the_state_dict_of_peft(dtype):
    model = wrapped(dtype)
    before = model.state_dict()
    initialize_peft_model(model, "pissa")
    restore_peft_model(model)
    after = model.state_dict()
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    model.load_state_dict(before)


def test_an_adapter_without_a_form_on_the_original_base_is_refused():
    model = started()
    model.add_adapter("wide", peft.LoraConfig(r=2, target_modules=["wide"]))
    for call in (model.state_dict, lambda: get_peft_model_state_dict(model)):
        with pytest.raises(ValueError, match="'wide' has other layers, ranks or scalings"):
            call()


def test_the_base_of_a_started_model_is_not_saved_alone(tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    initialize_peft_model(model, "pissa")
    with pytest.raises(ValueError, match="save_pretrained of the base model is not supported"):
        model.base_model.model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert_gap(logits(again, token_batches()), logits(llama(), token_batches()), 1e-5)


# -- merged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kaiming", "pissa", "loftq"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_calls_that_need_an_unmerged_base_are_refused(method, safe_merge, tmp_path):
    model = started(method=method)
    model.save_pretrained(tmp_path)
    expected = outputs(model)
    model.merge_adapter(safe_merge=safe_merge)
    calls = [
        restore_peft_model,
        lambda m: initialize_peft_model(m, "olora"),
        lambda m: load_peft_checkpoint(m, tmp_path),
    ]
    if method != "kaiming":
        calls += [lambda m: m.unload(), lambda m: m.load_adapter(tmp_path, "default")]
    for call in calls:
        with pytest.raises(ValueError, match="has merged adapters.*unmerge_adapter"):
            call(model)
        assert_gap(outputs(model), expected, 1e-5)
    model.unmerge_adapter()
    restore_peft_model(model)
    assert_gap(outputs(model), original(), 1e-5)


@by_dtype
def test_restoring_after_merging_and_unmerging(dtype):
    model = started(dtype)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges
        assert_gap(outputs(model, dtype), original(dtype), exact(dtype))
        restore_peft_model(model)
        assert_gap(outputs(model, dtype), original(dtype), exact(dtype))
    assert_gap(outputs(model, dtype), original(dtype), exact(dtype))
    with pytest.raises(ValueError, match="was not initialized"):
        restore_peft_model(model)


@by_dtype
def test_restoring_while_another_adapter_is_active(dtype):
    model = started(dtype)
    with pytest.warns(UserWarning, match="'second' is for the base that 'default' has changed"):
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["wide"]))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="'second' was used on the base that 'default'"):
        restore_peft_model(model)
    assert_gap(outputs(model, dtype), original(dtype), exact(dtype))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@by_dtype
def test_restoring_a_model_that_was_cast(dtype, cast):
    model = getattr(started(dtype), cast)()
    restore_peft_model(model)
    base = Case("Linear", dtype).build().float()
    for layer in adapted_layers(model, "default"):
        weight = base.get_submodule(layer.name).weight
        assert_gap(layer.base.weight.float(), weight, 0.02)
        assert layer.factor("lora_A").dtype == layer.base.weight.dtype


@by_dtype
def test_two_adapters_merged_together(dtype):
    model = started(dtype)
    model.add_adapter("ref", model.peft_config["default"])
    model.base_model.set_adapter(["default", "ref"])
    train(model, seed=7)
    expected = outputs(model, dtype)
    model.merge_adapter()
    assert_gap(outputs(model, dtype), expected, exact(dtype))
    model.unmerge_adapter()
    assert_gap(outputs(model, dtype), expected, exact(dtype))
    assert_gap(outputs(model.merge_and_unload(), dtype), expected, exact(dtype))


@by_dtype
def test_merging_an_adapter_that_does_not_cover_the_change_is_refused(dtype):
    model = started(dtype)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["wide"]))
    before = outputs(model, dtype)
    with pytest.raises(ValueError, match="'second' has other layers, ranks or scalings"):
        model.merge_and_unload(adapter_names=["second"])
    assert torch.equal(outputs(model, dtype), before)


@pytest.mark.parametrize("kind", ["linear", "svd", "cat"])
@by_dtype
def test_weighted_sums_of_adapters_are_refused(dtype, kind):
    model = started(dtype)
    model.add_adapter("ref", model.peft_config["default"])
    sum_up = lambda: model.add_weighted_adapter(["default", "ref"], [0.5, 0.5], "sum", kind)  # noqa: E731
    with pytest.raises(ValueError, match="add_weighted_adapter is not supported"):
        sum_up()
    assert "sum" not in model.peft_config


# -- deleted, and made again -----------------------------------------------------------------------


@pytest.mark.parametrize("by", ["model", "tuner"])
@pytest.mark.parametrize("method", ["kaiming", "eva", "pissa", "loftq"])
def test_a_new_adapter_with_the_name_of_a_deleted_one(method, by):
    model = wrapped()
    model.add_adapter("kept", peft.LoraConfig(r=2, target_modules=["wide"]))
    if method != "kaiming":
        model.delete_adapter("kept")
    calibration = Case().calibration() if method == "eva" else None
    initialize_peft_model(model, method, calibration=calibration)
    (model if by == "model" else model.base_model).delete_adapter("default")
    with pytest.raises(ValueError, match="adapter_name='default'"):
        restore_peft_model(model)
    model.add_adapter("default", peft.LoraConfig(r=8, lora_alpha=128, target_modules=TARGETS))
    model.set_adapter("default")
    with pytest.raises(ValueError, match="was not initialized by initialize_peft_model"):
        restore_peft_model(model)
    layers = adapted_layers(model, "default")
    assert {layer.scaling for layer in layers} == {16.0}
    assert all(layer.start is None for layer in layers)
    assert_gap(outputs(model.eval()), original(), 1e-5)
    initialize_peft_model(model, "pissa") if method != "kaiming" else None
    assert_gap(outputs(model), original(), 1e-5)


@pytest.mark.parametrize("method", ["kaiming", "eva", "pissa", "loftq"])
@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_restoring_after_unload_or_merge_is_refused(method, end):
    model = wrapped()
    calibration = Case().calibration() if method == "eva" else None
    initialize_peft_model(model, method, calibration=calibration)
    train(model)
    expected = outputs(model) if end == "merge_and_unload" else original()
    plain = getattr(model, end)()
    assert_gap(outputs(plain), expected, 1e-5)
    with pytest.raises(ValueError, match="was not initialized by initialize_peft_model"):
        restore_peft_model(model)
    assert_gap(outputs(plain), expected, 1e-5)
    assert all(type(module).__module__.startswith(("torch", "networks"))
               for module in plain.modules())  # fmt: skip
    get_peft_model(plain, LoraConfig(r=2, target_modules=TARGETS))


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
def test_injecting_an_initialized_adapter_again_is_refused(method):
    model = started(method=method)
    expected = outputs(model)
    with pytest.raises(ValueError, match="adapter_name='default' is not supported"):
        model.base_model.inject_adapter(model.base_model.model, "default")
    assert torch.equal(outputs(model), expected)


# -- a second model around the base ----------------------------------------------------------------

TAKEN = {
    "get_base_model": lambda model: model.get_base_model(),
    "attribute": lambda model: model.base_model.model,
    "copy": lambda model: copy.deepcopy(model.base_model.model),
    "unloaded around the guard": lambda model: type(model.base_model).unload(model.base_model),
    "modules taken out": lambda model: nn.Sequential(
        *[layer.base for layer in adapted_layers(model, "default")]
    ),
}


@pytest.mark.parametrize("taken", TAKEN)
@by_dtype
def test_a_changed_base_is_not_changed_twice(dtype, taken):
    model = started(dtype)
    base = TAKEN[taken](model)
    message = "initialized by initialize_peft_model already|was injected by PEFT"
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    for name in ("default", "other"):
        config = peft.LoraConfig(r=2, target_modules="all-linear")
        with pytest.raises(ValueError, match="started already|is not supported: these layers"):
            initialize_peft_model(peft.get_peft_model(base, config, adapter_name=name), "pissa",
                                  adapter_name=name)  # fmt: skip


# -- names that other programs look for ------------------------------------------------------------


@pytest.mark.parametrize("method", ["kaiming", "pissa", "loftq"])
@by_dtype
def test_only_pefts_layers_have_names_of_adapters(dtype, method):
    plain, model = wrapped(dtype), wrapped(dtype)
    initialize_peft_model(model, method)
    for found in (
        lambda m: [n for n, module in m.named_modules() if hasattr(module, "lora_A")],
        lambda m: [n for n, _ in m.named_modules() if "lora_" in n],
        lambda m: [n for n, _ in m.named_parameters()],
        lambda m: [n for n, _ in m.named_buffers() if "lora_" in n],
        lambda m: list(m.state_dict()),
        lambda m: m.get_nb_trainable_parameters(),
    ):
        assert found(model) == found(plain)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_model_that_is_cast_stays_at_its_start(cast):
    model = wrapped(torch.float32)
    initialize_peft_model(model, "pissa")
    x = Case().inputs().to(getattr(torch, {"half": "float16"}.get(cast, cast)))
    with torch.no_grad():
        actual = getattr(model, cast)()(x)
        expected = getattr(Case().build(), cast)()(x)
    assert_gap(actual, expected, 0.03)


# -- layers that the model does not use ------------------------------------------------------------


class Hidden(nn.Module):
    """Calls one layer by its attribute, and the other one from a list or a closure."""

    def __init__(self, how):
        super().__init__()
        self.seen, self.hidden = nn.Linear(8, 8), nn.Linear(8, 8)
        hidden = self.hidden
        if how == "list":
            self.held = [hidden]
        self.call = lambda x: (self.held[0] if how == "list" else hidden)(x)

    def forward(self, x):
        return self.call(torch.tanh(self.seen(x)))


@pytest.mark.parametrize("how", ["list", "closure"])
@pytest.mark.parametrize("method", ["kaiming", "pissa", "olora", "loftq"])
def test_a_layer_that_is_called_from_a_list_or_closure_is_found(method, how):
    config = peft.LoraConfig(r=2, target_modules=["seen", "hidden"])
    model = peft.get_peft_model(Hidden(how), config)
    x = torch.randn(4, 8)
    before = snapshot(model)
    with pytest.raises(ValueError, match="calls the original module of 'hidden'"):
        initialize_peft_model(model, method, verify=[x])
    before["state"] = model.state_dict()  # equal to the last bits
    assert_unchanged(model, before)
    initialize_peft_model(model, method)
    with model.disable_adapter():
        model(x)
    with pytest.warns(UserWarning, match="1 of 2 adapted layers were not used .*: 'hidden'"):
        model(x)
    assert not any(module._forward_hooks for module in (model.base_model.model, model))
    model(x)


def test_a_layer_that_gets_no_gradient_is_named():
    class Choice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.value = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.value(x[self.score(x).sum(-1).topk(2).indices])

    model = peft.get_peft_model(Choice(), peft.LoraConfig(r=2, target_modules=["score", "value"]))
    initialize_peft_model(model, "pissa")
    with pytest.warns(UserWarning, match="1 of 2 adapted layers get no gradient .* 'score'"):
        model(torch.randn(4, 8))


@pytest.mark.parametrize("method", ["kaiming", "pissa", "loftq"])
def test_a_model_that_uses_its_layers_passes(method, recwarn):
    model = wrapped()
    initialize_peft_model(model, method, verify=Case().inputs())
    outputs(model)
    restore_peft_model(model)
    initialize_peft_model(model, method)
    outputs(model)
    assert not [w for w in recwarn if "not used" in str(w.message)]
