"""loram: scipy's discrete sine transform, and the magnitude by its closed form."""

import math

import numpy
import pytest
import scipy.fft
import torch
from layers import layer_of, settings_of_scalings
from measures import relative_gap
from models import spread_weight
from networks import Chain

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.loram import LoramOptions, loram

RANK = 4
SHAPES = [(40, 40), (96, 24), (24, 96)]
SCALINGS = settings_of_scalings(RANK)


def factors_of(weight, rank=RANK, scaling=2.0, seed=0):
    return loram(layer_of(weight, rank, scaling, seed=seed), LoramOptions())


def reference(weight, rank=RANK, scaling=2.0):
    """Algorithm 1 with mean squares of whole matrices; the scaling multiplies the bases."""
    left, right = (
        torch.from_numpy(scipy.fft.dst(numpy.eye(size), type=1, norm="ortho"))[:, :rank]
        for size in weight.shape
    )
    gain = math.log(rank, min(weight.shape))
    wanted = gain * weight.double().square().mean()
    beta = (wanted / (scaling * left @ right.T).square().mean()) ** 0.25
    return beta * right.T, beta * left


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rank", [2, RANK, 24])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_papers_algorithm(rows, columns, rank, scaling):
    weight = spread_weight(rows, columns)
    factors = factors_of(weight, rank, scaling)
    lora_A, lora_B = reference(weight, rank, scaling)
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32
    assert relative_gap(factors.lora_A, lora_A) < 1e-6
    assert relative_gap(factors.lora_B, lora_B) < 1e-6
    product = scaling * factors.lora_B.double() @ factors.lora_A.double()
    share = math.log(rank) / math.log(min(rows, columns))
    assert float(product.norm() / weight.norm()) == pytest.approx(share**0.5)


@pytest.mark.parametrize("size", [25, 576, 4096])
def test_columns_are_orthogonal_and_of_one_norm(size):
    factors = factors_of(spread_weight(size, 32), rank=16)
    lora_B = factors.lora_B.double()
    square = lora_B.T @ lora_B
    assert relative_gap(square, square[0, 0] * torch.eye(16)) < 1e-6


def test_only_the_norm_of_the_weight_is_read():
    weight = spread_weight(40, 24)
    first, second = factors_of(weight), factors_of(weight.flip(0).neg(), seed=5)
    assert relative_gap(second.lora_A, first.lora_A) < 1e-6
    assert relative_gap(second.lora_B, first.lora_B) < 1e-6
    larger = factors_of(4 * weight)
    assert relative_gap(larger.lora_A, 2 * first.lora_A) < 1e-6
    again = factors_of(weight, seed=3)
    assert torch.equal(again.lora_A, first.lora_A)
    assert torch.equal(again.lora_B, first.lora_B)


def test_rank_1_is_refused():
    config = LoraConfig(r=1, target_modules=["tall"], init_lora_weights="loram")
    with pytest.raises(ValueError, match=r"'tall': loram cannot have rank 1.*r must be at least 2"):
        get_peft_model(Chain(), config)
