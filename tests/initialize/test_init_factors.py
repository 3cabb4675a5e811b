"""`init_factors` gives one matrix the numbers that `get_peft_model` gives a layer."""

import pytest
import torch
from methods import METHODS, behavior
from models import data_of
from products import thinned
from second import nearby
from torch import nn
from uniform import uniform

from lora_init import (
    LoraConfig,
    WithLoss,
    calibrate,
    get_peft_model,
    init_factors,
)

ROWS, COLUMNS, RANK = 24, 18, 4


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(COLUMNS, ROWS))


@pytest.mark.parametrize(
    ("method", "use_rslora"),
    thinned(
        [(method, use_rslora) for method in METHODS for use_rslora in (False, True)],
        lambda method, use_rslora: method,
        lambda method, use_rslora: (behavior(method), use_rslora),
    ),
)
def test_the_numbers_are_those_of_a_model(method, use_rslora):
    settings = {"r": RANK, "lora_alpha": 6.0, "use_rslora": use_rslora}
    chosen = {"name": method, **uniform(method)}
    config = LoraConfig(target_modules=["0"], init_lora_weights=chosen, **settings)
    data, found = {}, None
    if config.initializer()[0].needs_data:
        batches = WithLoss(
            [torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(1))],
            lambda model, batch: model(batch).square().mean(),
        )
        found = calibrate(base(), config, data_of(config.initializer()[0], batches))
        statistics = found.layers["0"]
        data = {"inputs": statistics.inputs, "gradient": statistics.gradient}
        if statistics.output_moments is not None:
            data["output_moments"] = statistics.output_moments
    model = get_peft_model(base(), config, calibration=found, seed=3, cache=False)
    weight = base()[0].weight
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
        assert torch.equal(replaced, layer.base_layer.weight)


def test_rows_of_inputs_are_as_good_as_a_calibration():
    rows = torch.randn(60, COLUMNS)
    config = LoraConfig(target_modules=["0"], r=RANK, init_lora_weights="corda")
    inputs = calibrate(base(), config, [rows]).layers["0"].inputs
    weight = base()[0].weight
    first, second = (init_factors(weight, "corda", r=RANK, inputs=one) for one in (rows, inputs))
    product = first.lora_B @ first.lora_A
    assert torch.allclose(product, second.lora_B @ second.lora_A, atol=1e-6 * float(product.norm()))


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
