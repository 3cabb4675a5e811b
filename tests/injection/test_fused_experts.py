"""Adapters on fused experts: factors, output, and every way out, for each method and layout."""

import copy

import pytest
import torch
from expert_mixture import Mixture, mixture_rows, reference
from measures import relative_gap
from methods import METHODS, SPECS, behavior
from models import Batches, data_of
from products import thinned
from torch import nn
from uniform import uniform

from lora_init import LoraConfig, get_peft_model, init_factors, reinitialize

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
LAYOUTS = ["concatenated", "interleaved, transposed, biased"]


def rank_of(method):
    """`orthogonal` needs an even rank."""
    return 2 if method == "orthogonal" else 3


def adapted(model, method, parameters=PARAMETERS, modules=None, verify=None, **settings):
    """The model with experts adapted by a method, at uniform ranks."""
    config = LoraConfig(
        r=rank_of(method),
        lora_alpha=5,
        init_lora_weights={"name": method, **uniform(method)},
        target_modules=modules,
        target_parameters=parameters,
        **settings,
    )
    calibration = data_of(SPECS[method], Batches(mixture_rows()))
    return get_peft_model(
        model, config, calibration=calibration, cache=False, keep_original=True, verify=verify
    )


def move(model):
    """Change the trained factors, as training does."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def deltas(model):
    """The change of each fused parameter's weight that the adapter computes, in float64."""
    found = {}
    for name, layer in model.layers.items():
        product = layer.output_factor.double() @ layer.lora_A.double()
        if layer.base_state == "in_forward":
            product = product - layer.initial_lora_B.double() @ layer.initial_lora_A.double()
        found[name.rpartition(".")[2]] = (layer.scaling * product).detach()
    return found


CELLS = thinned(
    [
        pytest.param(method, layout, rslora, id=f"{method}-{layout.split(',')[0]}-{rslora}")
        for method in METHODS
        for layout in LAYOUTS
        for rslora in (False, True)
        if "target_weight" not in SPECS[method].reads
    ],
    lambda method, layout, rslora: behavior(method),
    lambda method, layout, rslora: (SPECS[method].base, layout, rslora),
)


@pytest.mark.parametrize(("method", "layout", "rslora"), CELLS)
def test_a_start_of_experts_is_true_and_every_way_out_works(method, layout, rslora):
    model, x = Mixture(layout), mixture_rows()[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        base = twin(x)
    lora = adapted(model, method, use_rslora=rslora)
    rank = rank_of(method)
    assert lora.layers["experts.down_proj"].scaling == 5 / (rank**0.5 if rslora else rank)
    with torch.no_grad():
        start = lora(x)
        if SPECS[method].preserves_output:
            assert relative_gap(start, base) < 5e-6
        move(lora)
        moved = lora(x)
        present = lora.base_model.experts.base_layer
        wanted = copy.deepcopy(twin)
        for name in ("gate_up_proj", "down_proj"):
            getattr(wanted.experts, name).copy_(getattr(present, name))
        assert relative_gap(moved, reference(wanted, x, deltas(lora))) < 5e-6
        with lora.disable_adapter():
            assert relative_gap(lora(x), base) < 5e-6
        lora.merge_adapter()
        assert relative_gap(lora(x), moved) < 5e-6
        lora.unmerge_adapter()
        assert torch.equal(lora(x), moved)
        again = reinitialize(lora, LoraConfig(r=2, target_parameters=["down_proj"]))
        assert list(again.layers) == ["experts.down_proj"]
        plain = again.unload()
        assert type(plain.experts) is type(twin.experts)
        for key, value in twin.state_dict().items():
            assert torch.equal(plain.state_dict()[key], value), key


@pytest.mark.parametrize("method", ["kaiming", "pissa", "lora_xs"])
def test_each_expert_starts_as_a_layer_of_its_name(method):
    model = Mixture("interleaved, transposed, biased")
    weights = {name: getattr(model.experts, name).detach().mT.clone() for name in
               ("gate_up_proj", "down_proj")}  # fmt: skip
    lora = adapted(model, method)
    for name, layer in lora.layers.items():
        for expert, weight in enumerate(weights[name.rpartition(".")[2]]):
            alone = init_factors(weight, method, r=3, lora_alpha=5, name=f"{name}.{expert}")
            assert torch.equal(layer.lora_A[expert], alone.lora_A)
            assert torch.equal(layer.lora_B[expert], alone.lora_B)


def test_merged_and_unloaded_experts_are_plain():
    model, x = Mixture(), mixture_rows()[0]
    lora = adapted(model, "pissa", modules=["entry"])
    move(lora)
    with torch.no_grad():
        moved = lora(x)
        plain = lora.merge_and_unload()
        assert relative_gap(plain(x), moved) < 5e-6
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]


def test_the_gradient_is_that_of_the_sum_of_weights():
    model, x = Mixture(), mixture_rows()[0]
    lora = adapted(model, "pissa")
    move(lora)
    lora(x).double().square().sum().backward()
    factors = {
        name: (layer.lora_A.detach().double().requires_grad_(),
               layer.lora_B.detach().double().requires_grad_())
        for name, layer in lora.layers.items()
    }  # fmt: skip
    changes = {}
    for name, layer in lora.layers.items():
        lora_A, lora_B = factors[name]
        start = layer.initial_lora_B.double() @ layer.initial_lora_A.double()
        changes[name.rpartition(".")[2]] = layer.scaling * (lora_B @ lora_A - start)
    twin = copy.deepcopy(lora).unload()
    reference(twin, x, changes).square().sum().backward()
    for name, layer in lora.layers.items():
        for own, wanted in zip((layer.lora_A, layer.lora_B), factors[name], strict=True):
            assert relative_gap(own.grad, wanted.grad) < 1e-5


def test_a_checkpoint_of_experts_loads_into_another_start():
    first, second = (adapted(Mixture(), "pissa", modules=["entry"]) for _ in range(2))
    move(first)
    x = mixture_rows()[0]
    state = first.state_dict()
    assert {key.rpartition(".")[2] for key in state if "experts" in key} == {
        "lora_A", "lora_B", "initial_lora_A", "initial_lora_B"
    }  # fmt: skip
    second.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))


def test_dropout_acts_in_training_only():
    model, x = Mixture(), mixture_rows()[0]
    lora = adapted(model, "kaiming", lora_dropout=0.5)
    move(lora)
    with torch.no_grad():
        assert torch.equal(lora.eval()(x), lora(x))
        assert relative_gap(lora.train()(x), lora.eval()(x)) > 1e-3


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [("use_dora", True, "DoRA divides by the norms"), ("lora_bias", True, "which has no bias")],
)
def test_settings_that_experts_do_not_support_are_refused_with_the_reason(setting, value, reason):
    model = Mixture()
    before = copy.deepcopy(model.state_dict())
    message = (
        rf"'experts.gate_up_proj': {setting}={value} is not .*must be False, because .*{reason}"
    )
    with pytest.raises(TypeError, match=message):
        adapted(model, "kaiming", **{setting: value})
    assert type(model.experts).__name__ == "MixtralExperts"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_start_from_second_weights(layout):
    model, other = Mixture(layout), Mixture(layout)
    with torch.no_grad():
        other.experts.down_proj.mul_(1.5)
    config = LoraConfig(r=16, lora_alpha=16, init_lora_weights="from_delta",
                        target_parameters=["experts.down_proj"])  # fmt: skip
    lora = get_peft_model(model, config, target_weights=other.state_dict(), cache=False)
    with torch.no_grad():
        assert relative_gap(lora(mixture_rows()[0]), other(mixture_rows()[0])) < 1e-5


def test_hooks_of_the_experts_run():
    model, x = Mixture(), mixture_rows()[0]
    inputs, outputs = [], []
    model.experts.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    lora = adapted(model, "pissa", verify=x)
    module = lora.base_model.experts.base_layer
    module.register_forward_hook(lambda module, args, output: outputs.append(output) or 2 * output)
    move(lora)
    inputs.clear()
    with torch.no_grad():
        doubled = lora(x)
        assert torch.equal(doubled, 2 * outputs[-1])
        module._forward_hooks.clear()
        assert torch.equal(lora(x), outputs[-1])
    assert len(inputs) == 2
    assert "forward" not in vars(module)


def test_a_forward_that_is_set_on_adapted_experts_is_refused():
    model, x = Mixture(), mixture_rows()[0]
    lora = adapted(model, "pissa")
    lora.base_model.experts.base_layer.forward = lambda *args: args[0]
    with pytest.raises(RuntimeError, match="a forward was set on this MixtralExperts after"):
        lora(x)


def test_a_failed_injection_leaves_the_experts():
    model = Mixture()
    names = list(dict(model.named_modules()))
    config = LoraConfig(target_modules=["entry"], target_parameters=PARAMETERS)
    with pytest.raises(ValueError, match="verify"):
        get_peft_model(Bypassing(model), config, verify=mixture_rows()[0])
    assert list(dict(model.named_modules())) == names


class Bypassing(nn.Module):
    """A model that calls its experts through a second reference."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.held = [inner.experts]

    def forward(self, x):
        hidden = self.inner.entry(x)
        return self.held[0](hidden, *self.inner.routing(hidden))
