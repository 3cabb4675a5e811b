"""Weights with NaN or infinity are refused by the methods that read them."""

import pytest
import torch
from measures import assert_unchanged, snapshot
from torch import nn

from lora_init import LoraConfig, get_peft_model
from lora_init.linalg.matrix import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_is_enough(dtype, value):
    numbers = torch.randn(7, 33).to(dtype)
    assert is_finite(numbers)
    numbers[6, 32] = value
    assert not is_finite(numbers)


def test_a_sum_beyond_the_range_is_no_infinity():
    largest = torch.full((64, 64), torch.finfo(torch.float32).max)
    assert torch.isinf(largest.sum())
    assert is_finite(largest)


@pytest.mark.parametrize("method", ["pissa", "milora", "olora", "loftq", "mica"])
def test_a_method_that_reads_weights_refuses_a_bad_one(method):
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    with torch.no_grad():
        model[1].weight[3, 4] = float("inf")
    before = snapshot(model)
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=method)
    with pytest.raises(ValueError, match=r"target '1': its weight holds NaN or infinite values"):
        get_peft_model(model, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", ["kaiming", "gaussian", "orthogonal"])
def test_a_method_that_reads_no_weight_does_not_check_it(method):
    model = nn.Sequential(nn.Linear(8, 12))
    with torch.no_grad():
        model[0].weight[3, 4] = float("inf")
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=method)
    assert get_peft_model(model, config).layers["0"].lora_A.isfinite().all()
