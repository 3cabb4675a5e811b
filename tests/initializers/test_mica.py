"""mica: the left vectors of the smallest singular values, frozen, and an A of zeros."""

import copy

import peft
import pytest
import torch
from layers import layer_of
from measures import relative_gap
from models import spread_weight
from networks import Chain

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.mica import MicaOptions, mica

RANK = 4
SHAPES = [(40, 40), (96, 24), (24, 96)]
TARGETS = ["square", "tall", "wide"]


def factors_of(weight, rank=RANK, scaling=2.0, seed=0):
    return mica(layer_of(weight, rank, scaling, seed=seed), MicaOptions())


def reference(weight, rank=RANK):
    """The last columns of U of the thin SVD, the very last first; largest entries positive."""
    left = torch.linalg.svd(weight.double(), full_matrices=False)[0].flip(1)[:, :rank]
    return left * torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))


@pytest.mark.parametrize("rank", [1, RANK, 24])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_end_of_the_full_svd(rows, columns, rank):
    weight = spread_weight(rows, columns)
    factors = factors_of(weight, rank)
    assert relative_gap(factors.lora_B, reference(weight, rank)) < 1e-4
    assert factors.lora_A.shape == (rank, columns)
    assert not factors.lora_A.any()


def test_is_the_end_of_the_full_svd_where_inverses_answer():
    weight = spread_weight(420, 320)
    factors = factors_of(weight, rank=8)
    assert factors.metrics["algorithm"] == "inverse"
    basis, expected = factors.lora_B.double(), reference(weight, 8)
    assert relative_gap(basis @ basis.T, expected @ expected.T) < 1e-3


def test_neither_scaling_nor_seed_enters_and_factors_nest():
    weight = spread_weight(60, 40)
    lora_B = factors_of(weight, 12).lora_B
    for rank, scaling, seed in ((12, 1 / 16, 3), (5, 16.0, 0)):
        assert torch.equal(factors_of(weight, rank, scaling, seed).lora_B, lora_B[:, :rank])


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_is_pefts_own_up_to_order_and_sign(kind):
    base = Chain(kind)
    ours = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights="mica"),
    )
    settings = peft.LoraConfig(
        r=RANK, target_modules=TARGETS, init_lora_weights="mica", fan_in_fan_out=kind == "Conv1D"
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), settings)
    for name, layer in ours.layers.items():
        other = theirs.base_model.model.get_submodule(name).lora_B["default"].weight.flip(1)
        signs = torch.sign((layer.lora_B * other).sum(0))
        assert relative_gap(layer.lora_B, other * signs) < 1e-3, name
