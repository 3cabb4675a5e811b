"""random (init_lora_weights=False): both factors as two nn.Linear layers have them."""

import torch
from layers import layer_of
from measures import relative_gap
from networks import Chain, chain_inputs
from scipy import stats

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.random import random
from lora_init.registry import Options


def test_distribution():
    rows, columns, rank = 640, 768, 16
    weight = torch.empty(rows, columns)
    factors = random(layer_of(weight, rank), Options())
    for factor, fan_in in ((factors.lora_A, columns), (factors.lora_B, rank)):
        bound = fan_in**-0.5
        values = factor.flatten().double().numpy()
        assert stats.kstest(values, stats.uniform(-bound, 2 * bound).cdf).pvalue > 0.01
        assert abs(values).max() <= bound
    a, b = factors.lora_A.flatten()[:4096], factors.lora_B.flatten()[:4096]
    assert stats.pearsonr(a.numpy(), b.numpy()).pvalue > 0.01


def test_false_changes_the_output():
    """Its purpose: whoever sees the base model's output has no active adapter."""
    base = Chain()
    x = chain_inputs(20)
    expected = base(x)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["square", "wide"], init_lora_weights=False)
    )
    assert relative_gap(model(x), expected) > 0.1
