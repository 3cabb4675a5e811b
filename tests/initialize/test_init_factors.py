"""`init_factors` gives one matrix the numbers that `get_peft_model` gives a layer."""

import dataclasses
from itertools import product

import pytest
import torch
from methods import METHODS, SPECS, behavior
from models import data_of
from products import thinned
from second import nearby
from torch import nn
from transformers.pytorch_utils import Conv1D
from uniform import uniform

from lora_init import (
    LoraConfig,
    WithLoss,
    apply_factors,
    calibrate,
    get_peft_model,
    init_factors,
)
from lora_init.weights.kinds import oriented_weight

ROWS, COLUMNS, RANK = 24, 18, 4


def base(kind="Linear", dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, ROWS) if kind == "Linear" else Conv1D(ROWS, COLUMNS)
    return nn.Sequential(layer.to(dtype))


@pytest.mark.parametrize(
    ("method", "use_rslora", "kind", "dtype"),
    thinned(
        list(
            product(METHODS, [False, True], ["Linear", "Conv1D"], [torch.float32, torch.bfloat16])
        ),
        lambda method, use_rslora, kind, dtype: (method, kind),
        lambda method, use_rslora, kind, dtype: (behavior(method), use_rslora),
        lambda method, use_rslora, kind, dtype: (behavior(method), kind, dtype),
    ),
    ids=str,
)
def test_the_numbers_are_those_of_a_model(method, use_rslora, kind, dtype):
    """The tests of each method compare those of `init_factors` with the method's formula."""
    settings = {"r": RANK, "lora_alpha": 6.0, "use_rslora": use_rslora}
    chosen = {"name": method, **uniform(method)}
    config = LoraConfig(target_modules=["0"], init_lora_weights=chosen, **settings)
    data, found = {}, None
    if config.initializer()[0].needs_data:
        batches = WithLoss(
            [torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)],
            lambda model, batch: model(batch).float().square().mean(),
        )
        found = calibrate(base(kind, dtype), config, data_of(config.initializer()[0], batches))
        statistics = found.layers["0"]
        data = {"inputs": statistics.inputs, "gradient": statistics.gradient}
        if statistics.output_moments is not None:
            data["output_moments"] = statistics.output_moments
    model = get_peft_model(base(kind, dtype), config, calibration=found, seed=3, cache=False)
    weight = oriented_weight(base(kind, dtype)[0])
    if "target_weight" in config.initializer()[0].reads:
        data["target_weight"] = nearby(weight.detach(), "0")
    before = weight.detach().clone()
    factors = init_factors(weight, chosen, seed=3, name="0", **settings, **data)
    layer = model.layers["0"]
    assert torch.equal(factors.lora_A, layer.lora_A)
    assert torch.equal(factors.lora_B, layer.lora_B)
    assert torch.equal(weight, before)
    if factors.replacement is not None:
        replaced = factors.replacement.base(weight.detach(), layer.scaling)
        assert torch.equal(replaced.to(dtype), oriented_weight(layer.base_layer))


def test_rows_of_inputs_are_as_good_as_a_calibration():
    rows = torch.randn(60, COLUMNS)
    config = LoraConfig(target_modules=["0"], r=RANK, init_lora_weights="corda")
    inputs = calibrate(base(), config, [rows]).layers["0"].inputs
    weight = base()[0].weight
    first, second = (init_factors(weight, "corda", r=RANK, inputs=one) for one in (rows, inputs))
    one, other = (found.lora_B @ found.lora_A for found in (first, second))
    assert torch.allclose(one, other, atol=1e-6 * float(one.norm()))


def test_options_by_name():
    weight = base()[0].weight
    named = init_factors(weight, "pissa", r=RANK, options={"niter": 4})
    spelled = init_factors(weight, "pissa_niter_4", r=RANK)
    assert torch.equal(named.lora_A, spelled.lora_A)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_factors_are_float32_in_every_dtype(dtype):
    factors = init_factors(base()[0].weight.to(dtype), "pissa", r=RANK)
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32


WEIGHT = torch.randn(6, 5)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r=0 is not supported: must be an integer >= 1"),
        ({"r": 6}, "rank 6 exceeds"),
        ({"lora_alpha": -1}, "lora_alpha=-1 is not supported: must be a finite number > 0"),
        ({"weight": torch.randn(3)}, r"weight of shape \(3,\)"),
        ({"weight": torch.ones(3, 3, dtype=torch.int8)}, "torch.int8 .*floating-point matrix"),
        ({"weight": torch.full((6, 5), torch.nan)}, "NaN or infinite"),
        ({"method": "pisa"}, "did you mean 'pissa'"),
        ({"options": {"nitter": 4}}, "unknown option 'nitter'; did you mean 'niter'"),
        ({"method": {"name": "pissa"}, "options": {"niter": 4}}, "method must be a name"),
        ({"method": "corda"}, r"inputs=None .*Pass rows \(tokens, 5\)"),
        ({"method": "corda", "inputs": torch.randn(9, 4)}, r"inputs of shape \(9, 4\)"),
        ({"method": "lora_ga"}, "gradient=None"),
        ({"method": "lora_ga", "gradient": torch.randn(5, 6)}, r"must be a tensor \(6, 5\)"),
        ({"method": "lora_ga", "gradient": WEIGHT, "r": 3}, "must be at most 2"),
        ({"target_weight": WEIGHT}, "target_weight=Tensor is not supported: pissa"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments, message):
    given = {"weight": WEIGHT, "method": "pissa", "r": 2} | arguments
    with pytest.raises(ValueError, match=message):
        init_factors(given.pop("weight"), given.pop("method"), **given)


@pytest.mark.wrong_types
def test_a_weight_of_another_type_is_refused():
    with pytest.raises(TypeError, match="weight of type list is not supported"):
        init_factors([[1.0]], "pissa", r=1)


COUNT = 3


def data_read(method, count):
    """What a method reads, drawn for a stack; the rows differ in number between matrices."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def rows():
        return [draw(30 + index, COLUMNS) for index in range(count)]

    spec = SPECS[method]
    sets = spec.options(**uniform(method)).input_request().sets if "inputs" in spec.reads else ()
    weight, made = draw(count, ROWS, COLUMNS), {}
    if "inputs" in spec.reads:
        made["inputs"] = {name: rows() for name in sets} if sets else rows()
    if "gradient" in spec.reads:
        made["gradient"] = draw(count, ROWS, COLUMNS)
    if "output_moments" in spec.reads:
        made["output_moments"] = draw(count, ROWS).square()
    if "target_weight" in spec.reads:
        made["target_weight"] = weight + 0.1 * draw(count, ROWS, COLUMNS)
    return weight, made


def of_one(value, index):
    if isinstance(value, dict):
        return {name: each[index] for name, each in value.items()}
    return value[index]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_a_stack_has_the_numbers_of_its_matrices(method):
    """And so has what becomes of the base; with the adapter, it computes the original weight."""
    settings = {"r": RANK, "lora_alpha": 6.0, "seed": 3}
    chosen = {"name": method, **uniform(method)}
    weight, data = data_read(method, COUNT)
    stack = init_factors(weight, chosen, name="experts", **settings, **data)
    scaling = settings["lora_alpha"] / RANK
    bases = apply_factors(weight, stack, scaling)
    for index in range(COUNT):
        alone = {key: of_one(value, index) for key, value in data.items()}
        one = init_factors(weight[index], chosen, name=f"experts.{index}", **settings, **alone)
        assert torch.equal(stack.lora_A[index], one.lora_A)
        assert torch.equal(stack.lora_B[index], one.lora_B)
        assert stack.core is None or torch.equal(stack.core[index], one.core)
        assert torch.equal(bases[index], apply_factors(weight[index], one, scaling))
    if stack.base == "subtract":
        adapted = bases + scaling * stack.output_factor @ stack.lora_A
        size = max(1.0, float((scaling * stack.lora_B @ stack.lora_A).norm() / weight.norm()))
        torch.testing.assert_close(adapted, weight, rtol=0, atol=1e-5 * size)
    elif stack.base == "keep":
        assert bases is weight


@pytest.mark.parametrize("method", ["pissa", "loftq", "kaiming"])
def test_the_base_is_that_of_a_model(method):
    config = LoraConfig(target_modules=["0"], r=RANK, lora_alpha=6.0, init_lora_weights=method)
    model = get_peft_model(base(), config, seed=3, cache=False)
    weight = base()[0].weight.detach()
    factors = init_factors(weight, method, r=RANK, lora_alpha=6.0, seed=3, name="0")
    found = apply_factors(weight, factors, 1.5)
    x, layer = torch.randn(5, COLUMNS), model.layers["0"]
    expected = layer(x) - layer.base_layer.bias
    product = 1.5 * factors.lora_B @ factors.lora_A
    torch.testing.assert_close(x @ (found + product).T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_changed_base_is_float32_or_wider(dtype):
    weight = torch.randn(2, 6, 5).to(dtype)
    factors = init_factors(weight, "pissa", r=2)
    found = apply_factors(weight, factors)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    adapted = found + factors.lora_B @ factors.lora_A
    torch.testing.assert_close(adapted.double(), weight.double(), rtol=0, atol=1e-5)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.randn(0, 6, 5)}, r"weight of shape \(0, 6, 5\)"),
        (
            {"method": "corda", "inputs": torch.randn(3, 9, 5)},
            "inputs with 3 entries .* 2 matrices",
        ),
        ({"method": "corda", "inputs": [torch.randn(9, 5)]}, "a list with 2 entries"),
        ({"method": "corda", "inputs": [torch.randn(9, 4)] * 2}, r"inputs of shape \(9, 4\)"),
        ({"method": "corda", "inputs": 1}, "inputs of type int"),
        ({"method": "corda"}, r"inputs=None .*Pass rows \(tokens, 5\)"),
        ({"method": "sc_lora", "inputs": {"learn": torch.randn(1, 9, 5)}}, r"inputs\['learn'\]"),
        ({"method": "lora_ga", "gradient": WEIGHT}, "gradient with 6 entries"),
        ({"weight": torch.full((2, 6, 5), torch.nan), "name": "up"}, "up.0.* NaN or infinite"),
    ],
)
def test_a_wrong_argument_of_a_stack_is_refused_by_name(arguments, message):
    given = {"weight": torch.randn(2, 6, 5), "method": "pissa", "r": 2} | arguments
    with pytest.raises(ValueError, match=message):
        init_factors(given.pop("weight"), given.pop("method"), **given)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("weight", "changes", "scaling", "message"),
    [
        (WEIGHT.T, {}, 1.0, r"weight of shape \(5, 6\)"),
        (WEIGHT, {"base": None}, 1.0, "factors.base=None"),
        (WEIGHT, {}, 0.0, "scaling=0.0 is not supported"),
        (WEIGHT, {}, float("nan"), "scaling=nan is not supported"),
    ],
)
def test_factors_that_do_not_fit_are_refused(weight, changes, scaling, message):
    factors = dataclasses.replace(init_factors(WEIGHT, "pissa", r=2), **changes)
    with pytest.raises(ValueError, match=message):
        apply_factors(weight, factors, scaling)
