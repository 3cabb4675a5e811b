"""gaussian: A normal with standard deviation 1/rank, B zero."""

import pytest
import torch
from layers import layer_of
from scipy import stats

from lora_init.initializers.gaussian import gaussian
from lora_init.registry import Options


@pytest.mark.parametrize(("rank", "columns"), [(1, 4096), (4, 2048), (16, 768)])
def test_distribution(rank, columns):
    """The deviation falls with the rank, not with the width or its square root."""
    factors = gaussian(layer_of(torch.empty(24, columns), rank, 0.5), Options())
    values = factors.lora_A.flatten().double().numpy()
    assert stats.kstest(values, stats.norm(scale=1 / rank).cdf).pvalue > 0.01
    assert values.std() == pytest.approx(1 / rank, rel=0.05)
    assert torch.equal(factors.lora_B, torch.zeros(24, rank))
