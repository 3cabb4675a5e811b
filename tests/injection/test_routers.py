"""Adapters on the weights of routers: starts, statistics, and every way out."""

import copy
import warnings

import pytest
import torch
from expert_mixture import Choice, mixture_rows
from measures import relative_gap
from methods import METHODS, SPECS, behavior, one_of_each
from models import Batches, data_of
from uniform import uniform

from lora_init import LoraConfig, WithLoss, calibrate, get_peft_model, init_factors, reinitialize


def adapted(model, method="kaiming", **settings):
    config = LoraConfig(
        r=2,
        lora_alpha=5,
        init_lora_weights={"name": method, **uniform(method)},
        target_parameters=["gate.weight"],
        **settings,
    )
    calibration = data_of(SPECS[method], Batches(mixture_rows()))
    return get_peft_model(model, config, calibration=calibration, cache=False, keep_original=True)


@torch.no_grad()
def move(model):
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


SUPPORTED = [m for m in METHODS if SPECS[m].reads.isdisjoint({"target_weight", "output_moments"})]


@pytest.mark.parametrize("kind", ["plain", "biased"])
@pytest.mark.parametrize("method", one_of_each(SUPPORTED, behavior))
@torch.no_grad()
def test_a_start_is_true_and_every_way_out_works(method, kind):
    model, x = Choice(kind), mixture_rows()[0]
    before = copy.deepcopy(model.state_dict())
    base = model(x)
    with torch.enable_grad():
        lora = adapted(model, method, use_rslora=kind == "biased")
    layer = lora.layers["gate"]
    if SPECS[method].preserves_output:
        assert relative_gap(lora(x), base) < 1e-6
    move(lora)
    moved = lora(x)
    wanted = Choice(kind)
    change = layer.output_factor.double() @ layer.lora_A.double()
    if layer.base_state == "in_forward":
        change -= layer.initial_lora_B.double() @ layer.initial_lora_A.double()
    wanted.gate.weight += layer.stored_weight + layer.scaling * change - wanted.gate.weight
    assert relative_gap(moved, wanted(x)) < 1e-5
    with lora.disable_adapter():
        assert relative_gap(lora(x), base) < 1e-6
    lora.merge_adapter()
    assert relative_gap(lora(x), moved) < 1e-5
    lora.unmerge_adapter()
    assert torch.equal(lora(x), moved)
    again = reinitialize(lora, LoraConfig(r=1, target_modules=["gate"], init_lora_weights="pissa"))
    assert relative_gap(again(x), base) < 1e-6
    plain = again.unload()
    assert type(plain.gate) is type(wanted.gate)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_start_is_that_of_a_layer_of_this_name():
    model, x = Choice(), mixture_rows()[0]
    weight = model.gate.weight.detach().clone()
    lora = adapted(model, "pissa")
    alone = init_factors(weight, "pissa", r=2, lora_alpha=5, name="gate")
    assert torch.equal(lora.layers["gate"].lora_A, alone.lora_A)
    move(lora)
    with torch.no_grad():
        moved = lora(x)
        assert relative_gap(lora.merge_and_unload()(x), moved) < 1e-5


def test_statistics_are_those_of_the_rows_that_the_router_reads():
    model, batches = Choice(), mixture_rows()
    rows = torch.cat([model.entry(x) for x in batches]).detach().double()
    config = LoraConfig(r=2, init_lora_weights="corda", target_modules=["gate"])
    inputs = calibrate(model, config, Batches(batches)).layers["gate"].inputs
    assert inputs.tokens == len(rows)
    assert relative_gap(inputs.second_moment, rows.T @ rows / len(rows)) < 1e-5


def test_the_gradient_is_that_of_the_weight():
    model, batches = Choice(), mixture_rows()

    def loss(one, x):
        return one(x).square().mean()

    config = LoraConfig(r=2, init_lora_weights="lora_ga", target_modules=["gate"])
    found = calibrate(model, config, WithLoss(Batches(batches), loss)).layers["gate"].gradient
    twin = copy.deepcopy(model)
    twin.gate.requires_grad_(True)
    for x in batches:
        (loss(twin, x) / len(batches)).backward()
    assert relative_gap(found.dense() if hasattr(found, "dense") else found,
                        twin.gate.weight.grad) < 1e-5  # fmt: skip
    assert model.gate.weight.grad is None
    assert not model.gate.weight.requires_grad


def test_the_gradients_of_the_factors_are_those_of_the_sum_of_weights():
    model, x = Choice(), mixture_rows()[0]
    lora = adapted(model, "pissa")
    move(lora)
    lora(x).square().sum().backward()
    layer = lora.layers["gate"]
    factors = [f.detach().clone().requires_grad_() for f in (layer.lora_A, layer.lora_B)]
    change = factors[1] @ factors[0] - layer.initial_lora_B @ layer.initial_lora_A
    weight = layer.stored_weight.detach() + layer.scaling * change
    torch.func.functional_call(Choice(), {"gate.weight": weight}, x).square().sum().backward()
    for own, wanted in zip((layer.lora_A, layer.lora_B), factors, strict=True):
        assert relative_gap(own.grad, wanted.grad) < 1e-5


@pytest.mark.parametrize(
    ("setting", "value"), [("use_dora", True), ("lora_bias", True), ("lora_dropout", 0.1)]
)
def test_settings_that_routers_do_not_support_are_refused(setting, value):
    model = Choice()
    message = rf"'gate': {setting}={value} is not supported with Router: must be .*, because "
    with pytest.raises(TypeError, match=message):
        adapted(model, **{setting: value})
    config = LoraConfig(r=2, target_modules="all-linear", experts=True, **{setting: value})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = get_peft_model(model, config, dry_run=True)
    assert [target.name for target in plan.targets] == ["entry"]
    assert [each.name for each in plan.left_out] == ["gate"]


def test_hooks_of_the_router_and_a_compiled_model_see_the_adapted_weight():
    model, x = Choice(), mixture_rows()[0]
    seen = []
    model.gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    lora = adapted(model)
    move(lora)
    with torch.no_grad():
        wanted = lora(x)
        assert torch.equal(seen[-1], wanted[:, : seen[-1].shape[1]])
        compiled = torch.compile(lora, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), wanted)
