"""What an adapted model can do and undo while it lives: merge, disable, delete, start again."""

import copy

import pytest
import torch
from measures import (
    EPSILON,
    assert_gap,
    assert_unchanged,
    largest_ratio,
    relative_gap,
    snapshot,
    train,
)
from methods import SPECS
from networks import Case, Chain, chain_inputs
from products import thinned
from torch import nn

from lora_init import LoraConfig, get_peft_model, reinitialize
from lora_init.injection import inject
from lora_init.plan.plan import Plan
from lora_init.weights.kinds import FORMATS
from lora_init.weights.linear import LinearFormat

pytestmark = pytest.mark.sampled(3)

CASES = [
    Case(),
    Case("Conv1D"),
    Case(dtype=torch.bfloat16),
    Case("Conv2d"),
    Case("Embedding"),
    Case("Linear4bit"),
    Case("Linear8bitLt"),
]
# One method for each thing that can become of a base, and one that reads calibration data.
METHODS = ["kaiming", "pissa", "loftq", "corda"]
SUPPORTED = [(m, c) for c in CASES for m in METHODS if c.kind in SPECS[m].module_types]
every_supported = pytest.mark.parametrize(("method", "case"), SUPPORTED, ids=str)


def settings_for(method, case, **settings):
    """The arguments of `get_peft_model` and `reinitialize`, without the model."""
    spec = SPECS[method]
    config = {"r": 4, "lora_alpha": 8, "target_modules": list(case.shapes)}
    return {
        "peft_config": LoraConfig(**config | {"init_lora_weights": method} | settings),
        "calibration": case.calibration() if spec.needs_data else None,
        "original_weights": case.originals() if spec.base == "replace" else None,
        "keep_original": spec.base == "replace",
    }


def adapt(method, case, base=None, **settings):
    base = case.build() if base is None else base
    return train(get_peft_model(base, **settings_for(method, case, **settings)))


def fail_at(monkeypatch, module, name, call):
    """Let the `call`-th call of a function run out of memory, as that module calls it."""
    function, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise MemoryError("no memory left")
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


# -- starting again --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "case", "use_dora"),
    thinned(
        [
            pytest.param(first, second, case, dora, id=f"{first}-{second}-{case}{'-dora' * dora}")
            for first, case in SUPPORTED
            for second in METHODS
            for dora in (False, True)
            if (second, case) in SUPPORTED
        ],
        lambda first, second, case, dora: (first, second),
        lambda first, second, case, dora: (first, str(case)),
        lambda first, second, case, dora: (first, dora),
    ),
)
def test_reinitialize_equals_a_fresh_start(case, first, second, use_dora):
    base = case.build()
    model = adapt(first, case, copy.deepcopy(base), use_dora=use_dora)
    again = reinitialize(model, **settings_for(second, case))
    fresh = get_peft_model(copy.deepcopy(base), **settings_for(second, case))
    edits = SPECS[first].base == "subtract" and case.dtype == torch.float32
    exact = case.packed or not edits
    for name, layer in again.layers.items():
        expected = fresh.layers[name]
        assert layer.base_state == expected.base_state
        for part in ("lora_A", "lora_B", "initial_lora_A", "initial_lora_B"):
            value, wanted = getattr(layer, part), getattr(expected, part)
            if exact:
                assert torch.equal(value, wanted), (name, part)
            else:  # an edited weight came back with other last bits
                torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4)
    x = case.inputs()
    tolerance = 0.0 if exact else 1e-5 * largest_ratio(fresh, base)
    if SPECS[second].base == "replace" and not exact:
        tolerance = 1e-2  # a last bit may cross a threshold of the quantizer
    assert_gap(again(x), fresh(x), tolerance)
    assert again.init_report().method == second
    with pytest.raises(RuntimeError, match="was unloaded. Call get_peft_model again"):
        model.unload()


@every_supported
def test_failing_reinitialize_leaves_the_trained_adapter(method, case, monkeypatch):
    biases = {} if case.kind == "Embedding" else {"bias": "all"}
    model = adapt(method, case, use_dora=True, **biases)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    before, x = snapshot(model), case.inputs()
    expected = model(x)

    def assert_as_before():
        assert_unchanged(model, before)
        assert {n: id(p) for n, p in model.named_parameters() if p.requires_grad} == {
            n: parameters[n] for n in parameters if before["flags"][n]
        }
        edited = any(layer.base_state == "edited" for layer in model.layers.values())
        assert_gap(model(x), expected, 1e-6 if edited else 0.0)

    with pytest.raises(ValueError, match="rank_pattern: 'nothing' matches none"):
        reinitialize(model, **settings_for(method, case, rank_pattern={"nothing": 2}))
    assert_as_before()
    with pytest.raises(ValueError, match="matches no module"):
        reinitialize(model, **settings_for(method, case, target_modules=["nothing"]))
    assert_as_before()
    with monkeypatch.context() as patch:
        fail_at(patch, inject, "_place", 1)
        with pytest.raises(MemoryError):
            reinitialize(model, **settings_for(method, case))
    assert_as_before()
    plan = reinitialize(model, **settings_for(method, case), dry_run=True)
    assert isinstance(plan, Plan)
    assert_as_before()
    # Still a live adapter: it trains, and goes away.
    assert relative_gap(train(model)(x), expected) > 1e-3
    model.unload()


def test_reinitialize_needs_the_original():
    model = train(get_peft_model(Chain(), LoraConfig(r=4, target_modules=["tall"],
                                                     init_lora_weights="loftq")))  # fmt: skip
    x = chain_inputs(20)
    expected = model(x)
    with pytest.raises(RuntimeError, match="'tall' was replaced.*keep_original=True"):
        reinitialize(model, LoraConfig(r=4, target_modules=["tall"]))
    assert torch.equal(model(x), expected)


def test_reinitialize_starts_other_modules_and_heads():
    base = Chain()
    config = LoraConfig(r=4, target_modules=["tall"], modules_to_save=["wide"], bias="all")
    model = train(get_peft_model(copy.deepcopy(base), config))
    again = reinitialize(
        model, LoraConfig(r=2, target_modules=["wide"], init_lora_weights="pissa")
    )  # fmt: skip
    assert list(again.layers) == ["wide"]
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        "base_model.wide.lora_A",
        "base_model.wide.lora_B",
    }
    x = chain_inputs(20)
    assert_gap(again(x), base(x), 1e-5)
    restored = again.unload()
    assert snapshot(restored)["flags"] == snapshot(base)["flags"]


@pytest.mark.parametrize("state", ["merged", "disabled"])
@pytest.mark.parametrize("method", METHODS)
def test_reinitialize_from_any_state(method, state):
    base, case = Chain(), Case()
    model = adapt(method, case, copy.deepcopy(base), bias="all")
    if state == "merged":
        model.merge_adapter()
        again = reinitialize(model, **settings_for("gaussian", case))
    else:
        with model.disable_adapter():
            again = reinitialize(model, **settings_for("gaussian", case))
    x = chain_inputs(20)
    assert_gap(again(x), base(x), 3 * EPSILON[torch.float32])
    assert_gap(again.unload()(x), base(x), 3 * EPSILON[torch.float32])


# -- taking it away --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_delete_is_unload(method):
    base = Chain()
    changed = copy.deepcopy(base)
    restored = adapt(method, Case(), changed).delete_adapter()
    assert restored is changed
    assert_gap(restored(chain_inputs(20)), base(chain_inputs(20)), 3 * EPSILON[torch.float32])


@pytest.mark.parametrize("method", METHODS)
def test_unload_inside_of_disable_adapter(method):
    """Leaving the context does not switch an adapter on that is gone."""
    base = Chain()
    model = adapt(method, Case(), copy.deepcopy(base), bias="all")
    with model.disable_adapter():
        restored = model.unload()
    x = chain_inputs(20)
    assert_gap(restored(x), base(x), 3 * EPSILON[torch.float32])


@pytest.mark.parametrize("method", METHODS)
def test_unload_of_a_merged_adapter(method):
    base = Chain()
    model = adapt(method, Case(), copy.deepcopy(base))
    model.merge_adapter()
    restored = model.unload()
    for name in Case().shapes:
        weight = base.get_submodule(name).weight
        error = (restored.get_submodule(name).weight - weight).abs().max()
        assert error <= 1e-6 * weight.abs().max()


# -- merging ---------------------------------------------------------------------------------------


@every_supported
@pytest.mark.filterwarnings("ignore:merged into")
def test_unmerge_is_exact_again_and_again(method, case):
    base = case.build()
    model = adapt(method, case, base)
    before, x = snapshot(base), case.inputs()
    expected = model(x)
    for _ in range(3):
        model.merge_adapter()
        model.merge_adapter()  # merged already: nothing happens
        with (
            pytest.raises(RuntimeError, match=r"is merged; call unmerge_adapter\(\) first"),
            model.disable_adapter(),
        ):
            pass
        model.unmerge_adapter()
        model.unmerge_adapter()
        assert_unchanged(base, before)
        assert torch.equal(model(x), expected)


def test_saving_in_between_is_refused_by_name(tmp_path):
    model = adapt("pissa", Case(), bias="all")
    model.merge_adapter()
    for call in (lambda: model.save_pretrained(tmp_path), model.state_dict):
        with pytest.raises(RuntimeError, match=r"is merged. Call unmerge_adapter\(\) first"):
            call()
    model.unmerge_adapter()
    with (
        model.disable_adapter(),
        pytest.raises(RuntimeError, match=r"is disabled. Exit disable_adapter\(\) first"),
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@every_supported
def test_failing_merge_leaves_the_adapter_unmerged(method, case, monkeypatch):
    base = case.build()
    model = adapt(method, case, base)
    before, x = snapshot(base), case.inputs()
    expected = model(x)
    for call in range(1, len(case.shapes) + 1):
        with monkeypatch.context() as patch:
            fail_at(patch, type(FORMATS[case.kind]), "write", call)
            with pytest.raises(MemoryError):
                model.merge_adapter()
        assert_unchanged(base, before)
        assert torch.equal(model(x), expected)


def test_failing_merge_and_unload_can_be_finished(monkeypatch):
    """Its weights are overwritten one by one; those that are merged are not merged twice."""
    model = adapt("pissa", Case())
    x = chain_inputs(20)
    expected = model(x)
    with monkeypatch.context() as patch:
        fail_at(patch, LinearFormat, "write", 2)
        with pytest.raises(MemoryError):
            model.merge_and_unload()
    assert_gap(model(x), expected, 1e-6)
    with pytest.raises(RuntimeError, match="merge_and_unload failed after it had merged 'square'"):
        model.unload()
    assert_gap(model.merge_and_unload()(x), expected, 1e-6)


def test_merging_keeps_a_module_that_was_trained_whole():
    base = Chain()
    config = LoraConfig(r=4, target_modules=["tall"], modules_to_save=["wide"])
    model = train(get_peft_model(copy.deepcopy(base), config))
    x = chain_inputs(20)
    expected = model(x)
    merged = model.merge_and_unload()
    assert_gap(merged(x), expected, 1e-6)
    assert not torch.equal(merged.wide.weight, base.wide.weight)
    assert type(merged.wide) is nn.Linear
