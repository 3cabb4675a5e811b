"""DoRA on every kind of base, against h = m · (V x) / ‖V‖ + bias computed in float64.

V is formed here, from the original weight (or the quantized one that replaced it) and the factors;
the norm is a constant for the gradient. Nothing of `lora_init.layers` is used.
"""

import copy
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import EPSILON, assert_gap, train
from methods import SPECS
from models import spread_weight
from networks import PACKED_KINDS, Case
from products import every_value
from torch import nn
from torch.nn import functional

from lora_init import LoraConfig, get_peft_model
from lora_init.layers import dora
from lora_init.weights.kinds import oriented_weight

KINDS = ["Linear", "Conv1D", "Conv2d", "Embedding", "Linear4bit"]
# Every way to account for the initial product: kept, edited, in the forward pass, replaced.
STATES = {
    "kept": ("kaiming", torch.float32),
    "random": ("random", torch.float32),
    "edited": ("pissa", torch.float32),
    "in_forward": ("pissa", torch.bfloat16),
    "replaced": ("loftq", torch.float32),
}


def adapted(kind, state, **settings):
    """A trained DoRA model, its untouched base, its case."""
    method, dtype = STATES[state]
    case = Case(kind, torch.float32 if kind in PACKED_KINDS else dtype)
    base = case.build()
    spec = SPECS[method]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=list(case.shapes), init_lora_weights=method,
        use_dora=True, **settings,
    )  # fmt: skip
    model = get_peft_model(
        copy.deepcopy(base),
        config,
        original_weights=case.originals() if spec.base == "replace" else None,
    )
    return train(model.train(), size=0.2), base, case


def frozen_weight(layer, module):
    """The weight under the adapter, without the adapter's own product, (out, in) in float64."""
    if layer.base_state == "replaced":
        return oriented_weight(layer.base_layer).double()
    weight = oriented_weight(module).double()
    if layer.base_state == "kept":
        return weight
    return weight - layer.scaling * (layer.initial_lora_B.double() @ layer.initial_lora_A.double())


def apply(kind, module, weight, x):
    """weight (out, in) in the module's place, on x, in float64."""
    if kind == "Embedding":
        return functional.embedding(x, weight.T)
    if kind == "Conv2d":
        kernel = weight.view(len(weight), *module.weight.shape[1:])
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        height, width = module._reversed_padding_repeated_twice[::2][::-1]
        padded = functional.pad(x.double(), (width, width, height, height), mode=mode)
        return functional.conv2d(padded, kernel, stride=module.stride, dilation=module.dilation)
    return x.double() @ weight.T


def along_outputs(kind, vector):
    return vector[:, None, None] if kind == "Conv2d" else vector


def expected_output(kind, layer, module, x, dropped=None, parts=None):
    """The definition, from parameters that may require a gradient (A, B, m in float64)."""
    lora_A, lora_B, magnitude = parts or (
        part.detach().double() for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    )
    frozen = frozen_weight(layer, module)
    delta = layer.scaling * lora_B @ lora_A
    gain = along_outputs(kind, magnitude / (frozen + delta).norm(dim=1).detach())
    if dropped is None:
        result = gain * apply(kind, module, frozen + delta, x)
    else:  # equation of the authors' code: the base's own output once, without dropout
        result = (
            apply(kind, module, frozen, x)
            + (gain - 1) * apply(kind, module, frozen, dropped)
            + gain * apply(kind, module, delta, dropped)
        )
    bias = getattr(module, "bias", None)
    return result if bias is None else result + along_outputs(kind, bias.detach().double())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_the_definition(kind, state):
    model, base, case = adapted(kind, state)
    for name, layer in model.layers.items():
        module, x = base.get_submodule(name), case.layer_inputs(name)
        expected = expected_output(kind, layer, module, x)
        assert_gap(layer(x), expected, 3 * EPSILON[case.dtype])


@pytest.mark.parametrize(
    ("kind", "leading", "adapter_dtype"),
    every_value(
        product(
            ["Linear", "Conv1D"],
            [(), (0,), (7,), (2, 3), (2, 0, 3)],
            [torch.float32, torch.bfloat16],
        ),
        3,
    ),
    ids=str,
)
def test_any_leading_dimensions(kind, leading, adapter_dtype):
    """Whether the products add up in one dtype (x's and the factors' are the same) or in two."""
    base = Case(kind).build()
    config = LoraConfig(r=4, target_modules=["tall"], use_dora=True)
    model = get_peft_model(copy.deepcopy(base), config, adapter_dtype=adapter_dtype)
    layer = train(model.train(), size=0.2).layers["tall"]
    x = torch.randn(*leading, layer.lora_A.shape[1], requires_grad=True)
    kept = x.detach().clone()
    result = layer(x)
    assert result.dtype == torch.float32
    assert result.shape == (*leading, layer.lora_B.shape[0])
    if x.numel():
        assert_gap(result, expected_output(kind, layer, base.tall, x), 3 * EPSILON[torch.float32])
    result.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(x, kept)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_autocast_multiplies_in_its_own_dtype(kind):
    model, _, case = adapted(kind, "kept")
    name, layer = next(iter(model.layers.items()))
    x = case.layer_inputs(name)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)
    assert not torch.equal(rounded, expected)
    assert_gap(rounded, expected, 3 * EPSILON[torch.bfloat16])


@pytest.mark.parametrize("state", STATES)
def test_output_on_an_8_bit_base(state):
    """LLM.int8 rounds the activations too, so V x is the base's own product and the factors'."""
    model, base, case = adapted("Linear8bitLt", state)
    for name, layer in model.layers.items():
        module, x = base.get_submodule(name), case.layer_inputs(name)
        frozen, lora_A, lora_B = (
            t.detach().double()
            for t in (oriented_weight(layer.base_layer), layer.lora_A, layer.lora_B)
        )
        delta = layer.scaling * lora_B @ lora_A
        if layer.base_state == "in_forward":
            initial = layer.initial_lora_B.double() @ layer.initial_lora_A.double()
            delta = delta - layer.scaling * initial
        gain = layer.lora_magnitude_vector.double() / (frozen + delta).norm(dim=1)
        bias = module.bias.double()
        product = layer.base_layer(x).double() - bias
        expected = gain * (product + x.double() @ delta.T) + bias
        assert_gap(layer(x), expected, 3 * EPSILON[torch.float32])


@pytest.mark.parametrize(
    ("kind", "state"),
    every_value(product([kind for kind in KINDS if kind != "Embedding"], STATES), 2),
)
@pytest.mark.filterwarnings("ignore:lora_dropout=0.4 with")
def test_dropout_leaves_the_base_alone(kind, state):
    model, base, case = adapted(kind, state, lora_dropout=0.4)
    for name, layer in model.layers.items():
        module, x = base.get_submodule(name), case.layer_inputs(name)
        torch.manual_seed(3)
        actual = layer(x)
        torch.manual_seed(3)
        dropped = functional.dropout(x, 0.4)
        assert not torch.equal(dropped, x)
        expected = expected_output(kind, layer, module, x, dropped)
        # A 16-bit product of the dropped input is rounded once more.
        assert_gap(actual, expected, 5 * EPSILON[case.dtype])
        expected = expected_output(kind, layer, module, x)
        assert_gap(layer.eval()(x), expected, 5 * EPSILON[case.dtype])


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_definition(kind, state):
    """None goes through the norm: the paper's section 4.3."""
    model, base, case = adapted(kind, state)
    for name, layer in model.layers.items():
        module, x = base.get_submodule(name), case.layer_inputs(name)
        own = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
        parts = [part.detach().double().requires_grad_() for part in own]
        expected = expected_output(kind, layer, module, x, parts=parts)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        (expected * weights).sum().backward()
        (layer(x) * weights).sum().backward()
        if getattr(module, "padding_idx", None) is not None:
            parts[0].grad[:, module.padding_idx] = 0
        for part, reference in zip(own, parts, strict=True):
            assert_gap(part.grad, reference.grad, 5 * EPSILON[case.dtype])


@pytest.mark.parametrize(
    ("kind", "state"), every_value(product([*KINDS, "Linear8bitLt"], STATES), 2)
)
def test_magnitude_starts_as_the_norm_of_what_it_scales(kind, state):
    """So that the start is the one without DoRA; of a subtracting method, ‖W‖."""
    method, dtype = STATES[state]
    case = Case(kind, torch.float32 if kind in PACKED_KINDS else dtype)
    spec, models = SPECS[method], []
    for use_dora in (False, True):
        config = LoraConfig(
            r=4, target_modules=list(case.shapes), init_lora_weights=method, use_dora=use_dora
        )  # fmt: skip
        originals = case.originals() if spec.base == "replace" else None
        models.append(get_peft_model(case.build(), config, original_weights=originals))
    plain, model = models
    base = case.build()
    for name, layer in model.layers.items():
        weight = frozen_weight(layer, base.get_submodule(name))
        weight = weight + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        magnitude = layer.lora_magnitude_vector
        assert magnitude.dtype == torch.float32
        assert_gap(magnitude, weight.norm(dim=1), 1e-6)
        if spec.preserves_output:
            original = oriented_weight(base.get_submodule(name)).double()
            assert_gap(magnitude, original.norm(dim=1), 1e-6)
        x = case.layer_inputs(name)
        assert_gap(layer(x), plain.layers[name](x), 3 * EPSILON[case.dtype])


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 12),
    scaling=st.sampled_from([0.01, 1.0, 16.0]),
    with_initial=st.booleans(),
    seed=st.integers(0, 9),
)
def test_norms_of_any_shape(rows, columns, rank, scaling, with_initial, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = spread_weight(rows, columns, generator)
    lora_A, initial_A = (torch.randn(rank, columns, generator=generator) for _ in range(2))
    lora_B, initial_B = (torch.randn(rows, rank, generator=generator) for _ in range(2))
    delta = lora_B.double() @ lora_A.double()
    initial = None
    if with_initial:
        delta = delta - initial_B.double() @ initial_A.double()
        initial = initial_A, initial_B, dora.projection(weight, initial_A)
    norms = dora.adapted_norms(weight, dora.square_norms(weight), lora_A, lora_B, scaling, initial)
    expected = (weight.double() + scaling * delta).norm(dim=1)
    # Squares of terms as large as these are added and subtracted.
    largest = weight.norm(dim=1) + scaling * (lora_B.norm(dim=1) * torch.linalg.norm(lora_A))
    assert ((norms - expected).abs() <= 1e-3 * largest).all()


def test_a_row_of_zeros_stays_zero():
    """Nothing to scale: no division by zero, and the row can learn through its factors."""
    base = nn.Sequential(nn.Linear(8, 6))
    with torch.no_grad():
        base[0].weight[2] = 0
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    x = torch.randn(5, 8)
    output = model(x)
    assert output.isfinite().all()
    assert torch.equal(output[:, 2], base[0].bias[2].expand(5))
    output.pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["loram", "random_bases", "matched_norm", "pissa", "olora"])
def test_rows_without_a_weight_start_as_they_were(method):
    """Where ‖V‖ cancels, the gain is not made from rounding."""
    base = nn.Sequential(nn.Linear(256, 512))
    with torch.no_grad():
        base[0].weight[:64] = 0
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    expected = base(x)
    config = LoraConfig(r=8, target_modules=["0"], use_dora=True, init_lora_weights=method)
    model = get_peft_model(base, config)
    assert_gap(model(x), expected, 1e-5)
    assert_gap(model(x.repeat(200, 1)), expected.repeat(200, 1), 1e-5)


def test_autocast_does_not_round_the_norm():
    case = Case()
    config = LoraConfig(
        r=4, target_modules=list(case.shapes), use_dora=True, init_lora_weights="pissa"
    )
    model = get_peft_model(case.build(), config)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in model.layers.values():
            assert (layer.gain() - 1).abs().max() == 0
