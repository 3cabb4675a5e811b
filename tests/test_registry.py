"""The registry: what it lists, refuses, and takes from third parties."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lora_init import (
    Factors,
    LoraConfig,
    get_peft_model,
    list_initializers,
    register_initializer,
    registry,
)

EIGHT = {"kaiming", "gaussian", "orthogonal", "olora", "pissa", "corda", "loftq", "eva"}


@pytest.fixture
def clean_registry():
    before = dict(registry._registry)
    yield
    registry._registry.clear()
    registry._registry.update(before)


def test_the_eight_are_listed_with_their_properties():
    specs = {spec.name: spec for spec in list_initializers()}
    assert set(specs) >= EIGHT | {"random"}
    for spec in specs.values():
        assert spec.paper
        assert spec.base in ("keep", "subtract", "replace")
        assert {"Linear", "Conv1D"} <= spec.module_types
        assert dataclasses.is_dataclass(spec.options)
        spec.options()  # defaults are valid
    assert {n for n, s in specs.items() if s.base == "subtract"} >= {"olora", "pissa", "corda"}
    assert {n for n, s in specs.items() if s.calibration} >= {"corda", "eva"}
    assert not specs["loftq"].preserves_output
    assert [spec.name for spec in list_initializers("o*")] == ["olora", "orthogonal"]


def test_a_name_is_registered_once(clean_registry):
    with pytest.raises(ValueError, match=r"'pissa' is already registered by lora_init\.init"):
        register_initializer("pissa")(lambda *args: None)
    with pytest.raises(ValueError, match="'My-Method'.*lower-case letters"):
        register_initializer("My-Method")(lambda *args: None)


def test_needing_inputs_and_saying_which_go_together(clean_registry):
    with pytest.raises(ValueError, match="'lost'.*contradict each other.*CalibrationRequest"):
        register_initializer("lost", needs=("inputs",))(lambda *args: None)


def test_a_method_of_ones_own(clean_registry):
    @dataclass
    class ConstantOptions:
        value: float = 0.5

    @register_initializer("constant", options=ConstantOptions, paper="test", needs=("weights",))
    def constant(weight, rank, scaling, statistics, options, generator):
        rows, columns = weight.shape
        return Factors(torch.full((rank, columns), options.value), torch.zeros(rows, rank))

    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="constant")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    assert torch.equal(model.layers["0"].lora_A, torch.full((2, 4), 0.5))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=ConstantOptions(value=2.0))
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    assert torch.equal(model.layers["0"].lora_A, torch.full((2, 4), 2.0))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda w, r: (torch.zeros(r, 9), torch.zeros(w.shape[0], r)), r"lora_A of shape \(2, 9\)"),
        (
            lambda w, r: (torch.full((r, w.shape[1]), float("nan")), torch.zeros(w.shape[0], r)),
            "non-finite values in lora_A",
        ),
    ],
)
def test_a_wrong_result_is_refused_by_name_and_layer(clean_registry, result, message):
    @register_initializer("broken", paper="test")
    def broken(weight, rank, scaling, statistics, options, generator):
        return Factors(*result(weight, rank))

    model = nn.Sequential(nn.Linear(4, 3))
    weight = model[0].weight.clone()
    with pytest.raises(
        ValueError, match=f"broken returned.*{message}.*'0'|broken returned {message}"
    ):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="broken"))
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, weight)


def test_frozen_factors_are_not_trained(clean_registry):
    @register_initializer("frozen_b", paper="test", frozen=("lora_B",))
    def frozen_b(weight, rank, scaling, statistics, options, generator):
        return Factors(torch.zeros(rank, weight.shape[1]), torch.ones(weight.shape[0], rank))

    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="frozen_b")
    plan = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config, dry_run=True)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    layer = model.layers["0"]
    assert layer.lora_A.requires_grad
    assert not layer.lora_B.requires_grad
    assert plan.parameters == model.get_nb_trainable_parameters()[0] == 8
