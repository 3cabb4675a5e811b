"""init_b: the distribution of B, and the gradient of the first step."""

import pytest
import torch
from layers import layer_of
from measures import relative_gap

from lora_init.initializers.init_b import init_b
from lora_init.registry import Options


def factors_of(rows, columns, rank, scaling=2.0, seed=0):
    weight = torch.empty(rows, columns, device="meta")
    return init_b(layer_of(weight, rank, scaling, seed=seed), Options())


@pytest.mark.parametrize(("rows", "columns", "rank"), [(600, 40, 32), (40, 600, 400)])
def test_b_is_uniform_and_a_is_zero(rows, columns, rank):
    factors = factors_of(rows, columns, rank)
    assert factors.lora_A.shape == (rank, columns)
    assert not factors.lora_A.any()
    assert factors.lora_B.shape == (rows, rank)
    assert factors.lora_B.dtype == torch.float32
    deciles = torch.linspace(0, 1, 11)
    found = torch.quantile(factors.lora_B.flatten(), deciles) * rank**0.5
    torch.testing.assert_close(found, 2 * deciles - 1, rtol=0, atol=0.03)
    variance = float(factors.lora_B.double().square().mean())
    assert variance == pytest.approx(1 / (3 * rank), rel=0.03)


@pytest.mark.parametrize("scaling", [1.0, 2.0, 5.66, 16.0])
def test_only_a_gets_a_gradient_in_the_first_step(scaling):
    """dL/dA = s Bᵀ G and dL/dB = 0."""
    factors = factors_of(20, 12, 4, scaling)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    lora_A, lora_B = (
        part.double().clone().requires_grad_() for part in (factors.lora_A, factors.lora_B)
    )
    ((scaling * lora_B @ lora_A) * gradient).sum().backward()
    assert not lora_B.grad.any()
    assert relative_gap(lora_A.grad, scaling * factors.lora_B.double().T @ gradient) < 1e-12
    assert torch.equal(factors.lora_B, factors_of(20, 12, 4).lora_B)
