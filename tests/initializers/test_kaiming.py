"""kaiming: A uniform within ±1/sqrt(in), B zero."""

import torch
from layers import layer_of
from scipy import stats

from lora_init.initializers.kaiming import kaiming
from lora_init.registry import Options


def draw(rank, columns, name="layer", seed=0):
    weight = torch.empty(24, columns)
    return kaiming(layer_of(weight, rank, name=name, seed=seed), Options())


def test_distribution():
    for rank, columns in ((8, 1024), (16, 384)):
        factors = draw(rank, columns)
        bound = columns**-0.5
        values = factors.lora_A.flatten().double().numpy()
        assert stats.kstest(values, stats.uniform(-bound, 2 * bound).cdf).pvalue > 0.01
        assert abs(values).max() <= bound
        assert torch.equal(factors.lora_B, torch.zeros(24, rank))


def test_is_the_default_of_a_linear_layer():
    """The bound is that of `kaiming_uniform_` with a = sqrt(5), whatever the rank."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 64, bias=False).weight.detach().flatten()
    ours = draw(64, 512).lora_A.flatten()
    assert stats.ks_2samp(ours.numpy(), linear.numpy()).pvalue > 0.01


def test_layers_and_seeds_have_streams_of_their_own():
    draws = [draw(4, 64, name, seed).lora_A for name in ("a", "b") for seed in (0, 1)]
    for index, first in enumerate(draws):
        for second in draws[:index]:
            assert not torch.equal(first, second)
            correlation = stats.pearsonr(first.flatten().numpy(), second.flatten().numpy())
            assert correlation.pvalue > 0.01
    assert torch.equal(draw(4, 64, "a", 0).lora_A, draws[0])
