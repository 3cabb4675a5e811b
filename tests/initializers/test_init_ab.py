"""init_ab: the distribution of both factors, and what becomes of the base."""

import pytest
import torch
from layers import layer_of

from lora_init import LoraConfig
from lora_init.initializers.init_ab import InitAbOptions, InitAbSubtractedOptions, init_ab

RANK = 4
TEXT = pytest.param("1", marks=pytest.mark.wrong_types)
METHODS = ["init_ab", "init_ab_subtracted"]
every_method = pytest.mark.parametrize("method", METHODS)


def factors_of(rows, columns, rank=RANK, scaling=2.0, seed=0, **options):
    weight = torch.empty(rows, columns, device="meta")
    return init_ab(layer_of(weight, rank, scaling, seed=seed), InitAbOptions(**options))


@pytest.mark.parametrize("gamma", [0.25, 1, 3.0])
@pytest.mark.parametrize(("rows", "columns"), [(600, 150), (150, 600)])
def test_both_are_uniform_within_the_same_bound(rows, columns, gamma):
    factors = factors_of(rows, columns, rank=64, gamma=gamma)
    bound = gamma * columns**-0.5
    for factor, shape in ((factors.lora_A, (64, columns)), (factors.lora_B, (rows, 64))):
        assert factor.shape == shape
        assert factor.dtype == torch.float32
        assert float(factor.abs().max()) <= bound
        # Quantiles of 9,600 or more draws: three standard deviations are 0.031 of the bound.
        deciles = torch.linspace(0, 1, 11)
        found = torch.quantile(factor.flatten(), deciles) / bound
        torch.testing.assert_close(found, 2 * deciles - 1, rtol=0, atol=0.031)
    size = gamma**2 * (rows * 64 / columns) ** 0.5 / 3
    product = factors.lora_B.double() @ factors.lora_A.double()
    assert float(product.norm()) == pytest.approx(size, rel=0.05)
    # Drawn one after the other: neither is a copy of the other's numbers.
    count = min(factors.lora_A.numel(), factors.lora_B.numel())
    pair = torch.stack([factors.lora_A.flatten()[:count], factors.lora_B.flatten()[:count]])
    assert float(torch.corrcoef(pair)[0, 1].abs()) < 0.05


def test_seeded_by_layer_and_free_of_the_scaling():
    first, again = factors_of(24, 40), factors_of(24, 40, scaling=16.0)
    other = factors_of(24, 40, seed=1)
    for part in ("lora_A", "lora_B"):
        assert torch.equal(getattr(first, part), getattr(again, part))
        assert not torch.equal(getattr(first, part), getattr(other, part))


def test_each_method_has_options_of_its_own():
    for options, method in ((InitAbOptions, "init_ab"), (InitAbSubtractedOptions, METHODS[1])):
        spec, found = LoraConfig(init_lora_weights=options(gamma=0.5)).initializer()
        assert spec.name == method
        assert found == options(gamma=0.5)


@every_method
@pytest.mark.parametrize("gamma", [0, -1.0, float("inf"), float("nan"), TEXT, True])
def test_bad_gamma_is_refused(method, gamma):
    with pytest.raises(ValueError, match=rf"{method}: gamma=.*must be a finite number > 0"):
        LoraConfig(init_lora_weights={"name": method, "gamma": gamma})
