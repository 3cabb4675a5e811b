"""orthogonal: both factors non-zero, their product zero."""

import math

import pytest
import torch
from layers import layer_of
from measures import assert_unchanged, snapshot
from networks import Chain
from scipy import stats

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.orthogonal import OrthogonalOptions, orthogonal


def draw(rows, columns, rank, seed=0):
    weight = torch.empty(rows, columns)
    return orthogonal(layer_of(weight, rank, seed=seed), OrthogonalOptions())


@pytest.mark.parametrize("rank", [2, 8, 32])
def test_product_is_zero_and_factors_are_not(rank):
    factors = draw(96, 160, rank)
    lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
    size = lora_B.norm() * lora_A.norm()
    assert (lora_B @ lora_A).norm() < 1e-7 * size
    # Each is of rank r/2: r/2 gaussian vectors of variance 1/100 in an orthonormal basis.
    for factor, width in ((lora_A, 160), (lora_B, 96)):
        assert torch.linalg.matrix_rank(factor, rtol=1e-5) == rank // 2
        assert factor.norm() == pytest.approx(math.sqrt(rank / 2 * width) / 10, rel=0.15)


def test_distribution():
    """Every entry is a unit vector's combination of normals, but only r/2 of r rows are free.

    Given Q, A's entries are normal with variance (Q_oddᵀ Q_odd)_ii / 100; projecting A on Q_odd's
    row space gives back the normals N1 up to a rotation, which does not change their law.
    """
    for seed in range(3):
        factors = draw(512, 768, 8, seed)
        for factor in (factors.lora_A.double(), factors.lora_B.double().T):
            left, _, _ = torch.linalg.svd(factor, full_matrices=False)
            free = 10 * left[:, :4].T @ factor
            # Singular values order the rows; their pooled entries are normal all the same.
            assert stats.kstest(free.flatten().numpy(), stats.norm.cdf).pvalue > 0.01


def test_row_space_is_uniformly_distributed():
    """The projection on A's r/2 directions has expected diagonal 1/2 in every coordinate."""
    diagonal = torch.zeros(4, dtype=torch.float64)
    count = 300
    for seed in range(count):
        left = torch.linalg.svd(draw(16, 64, 4, seed).lora_A.double())[0][:, :2]
        diagonal += (left @ left.T).diagonal() / count
    # Var of one diagonal entry is 1/4 · 1/3 for a uniform plane in four dimensions.
    assert (diagonal - 0.5).abs().max() < 4 * (1 / 12 / count) ** 0.5


def test_odd_rank_is_refused():
    base = Chain()
    before = snapshot(base)
    for config in (
        LoraConfig(r=3, target_modules=["tall"], init_lora_weights="orthogonal"),
        LoraConfig(
            r=4, rank_pattern={"tall": 5}, target_modules=["wide", "tall"],
            init_lora_weights="orthogonal",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"'tall'.*orthogonal cannot have rank [35].*even"):
            get_peft_model(base, config)
    assert_unchanged(base, before)


def test_both_factors_learn_from_the_first_step():
    base = Chain()
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["square"], init_lora_weights="orthogonal")
    )
    model(torch.randn(8, 32)).pow(2).sum().backward()
    layer = model.layers["square"]
    assert layer.lora_A.grad.norm() > 0
    assert layer.lora_B.grad.norm() > 0
