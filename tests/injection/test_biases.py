"""bias="all" and "lora_only" (the base's own biases are trained), and lora_bias (one in B)."""

import copy

import pytest
import torch
from measures import EPSILON, assert_gap, assert_unchanged, logits, relative_gap, snapshot, train
from models import bert, token_batches
from networks import Case, chain_inputs
from torch import nn

from lora_init import LoraConfig, LoraModel, get_peft_model

CASES = [Case(), Case("Conv1D"), Case(dtype=torch.bfloat16), Case("Conv2d"), Case("Linear4bit")]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_method = pytest.mark.parametrize("method", ["kaiming", "pissa"])
every_mode = pytest.mark.parametrize("bias", ["all", "lora_only"])


def adapt(base, **settings):
    return get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8} | settings))


def trained_biases(model):
    names = (name for name, p in model.named_parameters() if p.requires_grad)
    return {name.removeprefix("base_model.") for name in names if name.endswith("bias")}


# -- bias ------------------------------------------------------------------------------------------


def test_which_biases_are_trained():
    targets = ["query", "attention.output.dense"]
    every = {name for name, _ in bert().named_parameters() if name.endswith(".bias")}
    adapted = {name for name in every if "query" in name or "attention.output.dense" in name}
    assert len(adapted) == 4
    for bias, expected in (("none", set()), ("lora_only", adapted), ("all", every)):
        model = adapt(bert(), target_modules=targets, bias=bias)
        found = {name.replace(".base_layer", "") for name in trained_biases(model)}
        assert found == expected
        assert len(model.plan.trained_biases) == len(expected)
        shown = f"biases trained: {len(expected)} ({bias})"
        assert (shown in str(model.plan)) == bool(expected)


@every_mode
def test_biases_of_a_module_trained_whole_are_trained_once(bias, tmp_path):
    """The classifier's trained copy has its bias; its untouched original keeps the old one."""
    base, batches = bert(), token_batches()
    original = logits(base, batches)
    model = adapt(copy.deepcopy(base), target_modules=["query"], task_type="SEQ_CLS", bias=bias)
    assert not [name for name in model.plan.trained_biases if "classifier" in name]
    assert {n for n in trained_biases(model) if "classifier" in n} == {
        "classifier.trained_module.bias"
    }
    trained = logits(train(model), batches)
    with model.disable_adapter():
        assert_gap(logits(model, batches), original, 0.0)
    model.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(logits(loaded, batches), trained, 1e-6)
    assert_gap(logits(model.unload(), batches), original, 0.0)


@every_mode
@every_method
@every_case
def test_trained_biases_come_and_go_with_the_adapter(case, method, bias, tmp_path):
    base = case.build()
    before, x = snapshot(base), case.inputs()
    settings = {"target_modules": list(case.shapes)[:2], "bias": bias, "init_lora_weights": method}
    model = train(adapt(copy.deepcopy(base), **settings), size=0.2)
    count = sum(bias == "all" or name in settings["target_modules"] for name in case.shapes)
    if case.kind == "Conv2d":
        count = 2  # the third convolution has none
    assert len(trained_biases(model)) == count
    trained = model(x)
    frozen = train(adapt(copy.deepcopy(base), **settings | {"bias": "none"}), size=0.2)
    assert relative_gap(trained, frozen(x)) > 1e-3, "the biases make no difference"

    with model.disable_adapter():
        for name in case.shapes:
            own = base.get_submodule(name).bias
            now = model.base_model.get_submodule(name).bias
            assert (own is None and now is None) or torch.equal(now, own)
    assert torch.equal(model(x), trained)

    model.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert trained_biases(loaded) == trained_biases(model)
    assert_gap(loaded(x), trained, 3 * EPSILON[case.dtype] if method == "pissa" else 0.0)

    if case.packed:
        return  # its merge is another test's, and lossy
    merged = copy.deepcopy(model).merge_and_unload()
    for name in model.plan.trained_biases:
        kept = model.base_model.get_submodule(name.removesuffix(".bias")).bias
        assert torch.equal(merged.get_parameter(name), kept)
    assert_gap(merged(x), trained, 3 * EPSILON[case.dtype])
    restored = model.unload()
    if method == "kaiming" or case.dtype != torch.float32:
        assert_unchanged(restored, before | {"modules": snapshot(restored)["modules"]})
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(restored.get_parameter(name), parameter)


# -- lora_bias -------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@every_method
@every_case
def test_lora_bias_is_a_bias_in_B(case, method, use_rslora, tmp_path):
    """h = base(x) + s (B A x + b), b zero at first."""
    base = case.build()
    settings = {
        "target_modules": list(case.shapes)[:2], "init_lora_weights": method,
        "use_rslora": use_rslora,
    }  # fmt: skip
    model = adapt(copy.deepcopy(base), lora_bias=True, **settings)
    plain = adapt(copy.deepcopy(base), **settings)
    x = case.inputs()
    assert torch.equal(model(x), plain(x))
    model(x).float().pow(2).sum().backward()
    for name, layer in model.layers.items():
        assert layer.lora_bias.shape == (case.shapes[name][0],)
        assert not layer.lora_bias.any()
        assert layer.lora_bias.grad.abs().max() > 0
        inputs = case.layer_inputs(name)
        before = layer(inputs).double()
        with torch.no_grad():
            layer.lora_bias.copy_(torch.randn(layer.lora_bias.shape))
        along = layer.lora_bias[:, None, None] if case.kind == "Conv2d" else layer.lora_bias
        expected = before + layer.scaling * along.double()
        assert_gap(layer(inputs), expected, 2 * EPSILON[case.dtype])
    trained = train(model)(x)
    model.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    tolerance = 3 * EPSILON[case.dtype]
    assert_gap(loaded(x), trained, tolerance if method == "pissa" else 0.0)
    with model.disable_adapter():
        for name, layer in model.layers.items():
            assert torch.equal(layer.bias, base.get_submodule(name).bias)
    if case.packed:
        return
    biases = {name: layer.base_layer.bias.clone() for name, layer in model.layers.items()}
    model.merge_adapter()
    assert_gap(model(x), trained, tolerance)
    model.unmerge_adapter()
    assert torch.equal(model(x), trained)
    for name, layer in model.layers.items():
        assert torch.equal(layer.base_layer.bias, biases[name])
    assert_gap(model.merge_and_unload()(x), trained, tolerance)


def test_lora_bias_beside_trained_biases():
    base = Case().build()
    model = train(adapt(base, target_modules=["tall"], lora_bias=True, bias="all"))
    x = chain_inputs(20)
    trained, original = model(x), Case().build()(x)
    model.merge_adapter()
    assert_gap(model(x), trained, 1e-6)
    model.unmerge_adapter()
    assert torch.equal(model(x), trained)
    with model.disable_adapter():
        assert torch.equal(model(x), original)
    assert torch.equal(model(x), trained)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_gap(merged(x), trained, 1e-6)
    assert torch.equal(model.unload()(x), original)


def test_lora_bias_cannot_be_merged_where_the_base_has_none():
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8, bias=False))
    model = train(adapt(base, target_modules=["0", "1"], lora_bias=True))
    before, x = snapshot(base), torch.randn(5, 8)
    expected = model(x)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="'1' has a lora_bias, but its base.* no bias"):
            call()
        assert_unchanged(base, before)
        assert torch.equal(model(x), expected)
