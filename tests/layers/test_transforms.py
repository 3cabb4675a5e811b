"""Whoever looks through a layer's forward pass sees plain operations, and every hook is called."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from lora_init import LoraConfig, get_peft_model
from lora_init.layers import linear
from lora_init.layers.linear import STACKED_POSITIONS


def adapted(use_dora, bias=True, **settings):
    generator = torch.Generator().manual_seed(3)
    base = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4, bias=bias))
    config = LoraConfig(r=2, target_modules=["0", "2"], use_dora=use_dora, **settings)
    model = get_peft_model(base.double(), config, adapter_dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).double()
    return model


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def model(request):
    return adapted(request.param)


def inputs(count=7):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1)).double()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_by_example(model):
    x, parameters = inputs(), trained(model)

    def loss(values, example):
        return functional_call(model, values, (example[None],)).square().sum()

    detached = {name: p.detach() for name, p in parameters.items()}
    together = vmap(grad(loss), in_dims=(None, 0))(detached, x)
    for number, example in enumerate(x):
        alone = torch.autograd.grad(model(example[None]).square().sum(), list(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(together[name][number], gradient)


def test_several_adapters_at_once(model):
    """An ensemble: factors with a leading dimension, one batch of inputs."""
    x, parameters = inputs(), trained(model)
    ensemble = {
        name: torch.stack([p.detach() * k for k in (1, 2)]) for name, p in parameters.items()
    }
    outputs = vmap(lambda values: functional_call(model, values, (x,)))(ensemble)
    for k in range(2):
        one = {name: values[k] for name, values in ensemble.items()}
        torch.testing.assert_close(outputs[k], functional_call(model, one, (x,)))


def test_forward_mode(model):
    x = inputs()
    direction = torch.ones_like(x)
    step = 1e-6
    expected = (model(x + step * direction) - model(x - step * direction)) / (2 * step)
    _, tangent = jvp(model, (x,), (direction,))
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        outputs = model(forward_ad.make_dual(x, direction))
        tangent = forward_ad.unpack_dual(outputs).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.wrong_types
def test_a_trace_can_be_saved(model):
    x = inputs()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model.base_model, (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


@pytest.fixture(params=[False, True], ids=["large", "small"])
def size(request, monkeypatch):
    """Large inputs take an autograd function, small ones torch's own operations."""
    monkeypatch.setattr(linear, "is_small", lambda x: request.param)
    return request.param


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}, {"lora_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_one_step_is_what_the_parts_are(use_dora, settings, bias, size):
    """The same outputs and gradients as with a hook, which takes the step apart."""
    if use_dora and "lora_bias" in settings:
        pytest.skip("DoRA has no lora_bias")
    whole = adapted(use_dora, bias, init_lora_weights="gaussian", **settings)
    parts = copy.deepcopy(whole)
    for layer in parts.layers.values():
        layer.base_layer.register_forward_hook(lambda module, args, out: None)
    results = []
    for model in (whole, parts):
        torch.manual_seed(0)
        model(inputs()).square().sum().backward()
        results.append(trained(model))
    for name, parameter in results[0].items():
        torch.testing.assert_close(parameter.grad, results[1][name].grad)


def test_long_inputs():
    """Where the norms are computed by themselves."""
    model = adapted(use_dora=True)
    layer = model.layers["0"]
    x = inputs(STACKED_POSITIONS["cpu"] + 1)
    torch.testing.assert_close(layer(x), torch.cat([layer(part) for part in x.split(1000)]))


def test_a_forward_of_another_class_is_called():
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = adapted(use_dora=False)
    layer = model.layers["0"]
    expected = layer(inputs()) + 1
    own = Shifted(6, 5, dtype=torch.float64)
    own.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = own
    torch.testing.assert_close(layer(inputs()), expected)


def test_a_backward_pass_under_autocast(model, monkeypatch):
    """Our autograd functions do not round there; torch's own operations, for small inputs, do."""
    monkeypatch.setattr(linear, "is_small", lambda x: False)
    model.float()
    x = inputs().float()
    plain = torch.autograd.grad(model(x).square().sum(), list(trained(model).values()))
    outputs = model(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.autograd.grad(outputs, list(trained(model).values()))
    for one, other in zip(plain, cast, strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other)


def test_nested_inputs():
    layer = adapted(use_dora=False).layers["0"]
    parts = inputs().split([3, 4])
    outputs = layer(torch.nested.nested_tensor(list(parts), layout=torch.jagged))
    for part, output in zip(parts, outputs.unbind(), strict=True):
        torch.testing.assert_close(output, layer(part))
