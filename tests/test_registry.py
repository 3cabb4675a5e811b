"""The registry: what it lists, refuses, and takes from third parties."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lora_init import (
    Factors,
    LoraConfig,
    Options,
    get_peft_model,
    init_factors,
    list_initializers,
    register_initializer,
    registry,
)
from lora_init.entry_points import EntryPoints
from lora_init.registry import workspace

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
        assert spec.paper, f"{spec.name} cites nothing"
        assert spec.function.__doc__, f"{spec.name} does not describe its factors"
        assert spec.base in ("keep", "subtract", "replace")
        assert {"Linear", "Conv1D"} <= spec.module_types
        assert dataclasses.is_dataclass(spec.options)
        spec.options()  # defaults are valid
    assert {n for n, s in specs.items() if s.base == "subtract"} >= {"olora", "pissa", "corda"}
    assert {n for n, s in specs.items() if s.reads & {"inputs", "gradient"}} >= {"corda", "eva"}
    assert not specs["loftq"].preserves_output
    found = [spec.name for spec in list_initializers("o*")]
    assert found == sorted(name for name in specs if name.startswith("o"))
    assert {"olora", "orthogonal"} <= set(found)


def test_a_name_is_registered_once(clean_registry):
    with pytest.raises(ValueError, match=r"'pissa' of .* is already registered by lora_init\.init"):
        register_initializer("pissa")(lambda *args: None)
    with pytest.raises(ValueError, match="'My-Method'.*lower-case letters"):
        register_initializer("My-Method")(lambda *args: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reads": ("weights",)}, "reads=weights is not supported: must be of weight, "),
        ({"modules": ("Dense",)}, "modules=Dense is not supported: must be of Linear"),
        ({"operations": ("sum",)}, "operations=sum is not supported: must be of product"),
        ({"base": "edit"}, "base=edit is not supported: must be of keep"),
    ],
)
@pytest.mark.wrong_types
def test_a_wrong_declaration_is_refused_by_name(clean_registry, arguments, message):
    with pytest.raises(ValueError, match=f"'lost': {message}"):
        register_initializer("lost", **arguments)(lambda *args: None)


@pytest.mark.parametrize(
    ("arguments", "supported", "refused"),
    [
        ({}, {"Linear", "Conv1D", "Linear4bit"}, {"Conv2d", "Embedding"}),
        ({"modules": ("Linear",)}, {"Linear"}, {"Conv1D", "Linear4bit", "Conv2d", "Embedding"}),
        ({"operations": ("lookup",)}, {"Embedding"}, {"Linear", "Conv2d"}),
        ({"operations": ("lookup",), "modules": ("Conv2d",)}, {"Embedding", "Conv2d"}, {"Linear"}),
    ],
)
def test_a_method_supports_operations_or_single_formats(
    clean_registry, arguments, supported, refused
):
    register_initializer("mine", **arguments)(lambda layer, options: None)
    (spec,) = list_initializers("mine")
    assert supported <= spec.modules == spec.module_types
    assert not refused & spec.modules


@pytest.mark.wrong_types
def test_options_must_inherit_from_options(clean_registry):
    with pytest.raises(TypeError, match="'lost': options=.*inherits from"):
        register_initializer("lost", options=dict)(lambda *args: None)


def test_a_method_of_ones_own(clean_registry):
    @dataclass
    class ConstantOptions(Options):
        value: float = 0.5

    @register_initializer("constant", options=ConstantOptions, paper="test", reads=("weight",))
    def constant(layer, options):
        rows, columns = layer.weight.shape
        lora_A = torch.full((layer.rank, columns), options.value)
        return Factors(lora_A, torch.zeros(rows, layer.rank))

    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="constant")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    assert torch.equal(model.layers["0"].lora_A, torch.full((2, 4), 0.5))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=ConstantOptions(value=2.0))
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    assert torch.equal(model.layers["0"].lora_A, torch.full((2, 4), 2.0))


def test_a_method_states_its_memory_in_its_file_or_gets_a_safe_estimate(clean_registry):
    def ones(layer, options):
        return Factors(torch.ones(layer.rank, layer.shape[1]), torch.zeros(layer.shape[0], 2))

    def megabytes(method):
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=method)
        return get_peft_model(base, config, dry_run=True).workspace_bytes / 4e6

    base = nn.Sequential(nn.Linear(2000, 1000, bias=False))
    register_initializer("stated", reads=("weight", "inputs"))(workspace(1.5, 0.5)(ones))
    by_options = workspace(lambda options: (options.copies, 0.0))

    @dataclass
    class CopiesOptions(Options):
        copies: float = 3.0

    register_initializer("chosen", options=CopiesOptions)(by_options(lambda *given: ones(*given)))
    register_initializer("silent", reads=("weight", "inputs"))(lambda *given: ones(*given))
    assert megabytes("stated") == 1.5 * 2 + 0.5 * 4
    assert megabytes({"name": "chosen", "copies": 4.0}) == 4.0 * 2
    others = [spec for spec in list_initializers() if spec.reads <= {"weight", "inputs"}]
    assert len(others) > 20
    assert megabytes("silent") >= max(megabytes(spec.name) for spec in others)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda w, r: (torch.zeros(r, 9), torch.zeros(w[0], r)), r"lora_A of shape \(2, 9\)"),
        (
            lambda w, r: (torch.full((r, w[1]), float("nan")), torch.zeros(w[0], r)),
            "non-finite values in lora_A",
        ),
    ],
)
def test_a_wrong_result_is_refused_by_name_and_layer(clean_registry, result, message):
    @register_initializer("broken", paper="test")
    def broken(layer, options):
        return Factors(*result(layer.shape, layer.rank))

    model = nn.Sequential(nn.Linear(4, 3))
    weight = model[0].weight.clone()
    with pytest.raises(
        ValueError, match=f"broken returned.*{message}.*'0'|broken returned {message}"
    ):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="broken"))
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, weight)


@pytest.mark.wrong_types
def test_mistakes_in_a_registration_name_the_fix(clean_registry):
    with pytest.raises(TypeError, match=r"reads='weight' is not supported"):
        register_initializer("text", reads="weight")(lambda layer, options: None)
    with pytest.raises(TypeError, match=r"must take two arguments, \(layer, options\)"):
        register_initializer("short")(lambda layer: None)


@pytest.mark.wrong_types
def test_mistakes_in_a_function_name_the_method(clean_registry):
    register_initializer("tuple")(lambda layer, options: (1, 2))
    register_initializer("undeclared")(lambda layer, options: layer.gradient.shape)
    with pytest.raises(TypeError, match=r"'tuple' returned tuple: must be lora_init.Factors"):
        init_factors(torch.ones(2, 3), "tuple", r=1)
    with pytest.raises(AttributeError) as caught:
        init_factors(torch.ones(2, 3), "undeclared", r=1)
    assert "'undeclared' declares reads=nothing" in caught.value.__notes__[0]


@pytest.mark.parametrize("group", ["lora_init.initializers", "lora_init.weight_formats"])
def test_an_entry_point_that_fails_names_its_package(tmp_path, monkeypatch, group):
    info = tmp_path / "sample_pkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sample-pkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nsample = no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="'sample' of sample-pkg in .* raised ModuleNotFound"):
        EntryPoints(group).load()
