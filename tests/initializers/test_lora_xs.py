"""lora_xs: the leading singular vectors of W by a full SVD in float64, and a small core."""

import pytest
import torch
from measures import relative_gap
from models import spread_weight
from networks import Chain, chain_inputs

from lora_init import LoraConfig, get_peft_model, init_factors

SHAPES = [(48, 48), (80, 32), (32, 80)]
RANK = 6


@pytest.mark.parametrize(("alpha", "use_rslora"), [(6, False), (12, False), (96, False), (6, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_papers_formula(shape, alpha, use_rslora):
    """The scaling does not change the factors."""
    weight = spread_weight(*shape)
    factors = init_factors(weight, "lora_xs", r=RANK, lora_alpha=alpha, use_rslora=use_rslora)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    best = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    assert relative_gap(factors.lora_B @ factors.lora_A, best) < 1e-4
    assert relative_gap(factors.lora_B.T @ factors.lora_B, torch.eye(RANK)) < 1e-5
    squares = torch.diag(values[:RANK] ** 2)
    assert relative_gap(factors.lora_A @ factors.lora_A.T, squares) < 1e-4
    assert factors.core.shape == (RANK, RANK)
    assert 0.5e-5 < factors.core.std() < 1.5e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank(shape):
    weight = spread_weight(*shape)
    factors = init_factors(weight, "lora_xs", r=min(shape))
    assert relative_gap(factors.lora_B @ factors.lora_A, weight) < 1e-4


def test_the_core_depends_on_the_seed_and_the_layer_alone():
    weight = spread_weight(16, 16)
    cores = [
        init_factors(weight, "lora_xs", r=2, seed=seed, name=name).core
        for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    ]
    assert torch.equal(cores[0], cores[1])
    assert not torch.equal(cores[0], cores[2])
    assert not torch.equal(cores[0], cores[3])


def test_without_noise_the_model_is_the_base_model():
    base, x = Chain(), chain_inputs(20)
    expected = base(x)
    config = LoraConfig(
        r=4, target_modules=["square", "tall"], init_lora_weights={"name": "lora_xs", "std": 0.0}
    )
    model = get_peft_model(base, config)
    assert torch.equal(model(x), expected)
    assert model.get_nb_trainable_parameters()[0] == 2 * 4**2 == model.plan.parameters


@pytest.mark.parametrize("std", [-1, float("nan")])
def test_bad_std(std):
    with pytest.raises(ValueError, match="lora_xs: std=.*finite number >= 0"):
        LoraConfig(init_lora_weights={"name": "lora_xs", "std": std})
