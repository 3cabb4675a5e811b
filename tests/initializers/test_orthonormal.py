"""orthonormal: random orthonormal rows, uniform over all directions."""

import pytest
import torch
from layers import layer_of

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.orthonormal import OrthonormalOptions, orthonormal


def factors_of(rows, columns, rank, *, scaling=2.0, **settings):
    weight = torch.empty(rows, columns, device="meta")
    return orthonormal(layer_of(weight, rank, scaling, **settings), OrthonormalOptions())


@pytest.mark.parametrize(("rows", "columns", "rank"), [(30, 50, 8), (50, 30, 8), (20, 24, 24)])
def test_rows_are_orthonormal(rows, columns, rank):
    factors = factors_of(rows, columns, rank)
    square = factors.lora_A.double() @ factors.lora_A.double().T
    torch.testing.assert_close(square, torch.eye(rank).double(), rtol=0, atol=1e-6)
    assert factors.lora_B.shape == (rows, rank)
    assert factors.lora_A.dtype == torch.float32
    assert not factors.lora_B.any()


def test_every_input_is_equally_likely():
    """The projection on the span of A has the mean rank / in · I over seeds."""
    projections = [
        part.T @ part for part in (factors_of(4, 8, 2, seed=seed).lora_A for seed in range(500))
    ]
    mean = torch.stack(projections).mean(0)
    torch.testing.assert_close(mean, 0.25 * torch.eye(8), rtol=0, atol=0.04)
    entries = torch.stack([factors_of(4, 8, 2, seed=seed).lora_A for seed in range(200)])
    assert abs(float(entries.mean())) < 0.03


def test_depends_on_seed_and_name_and_not_on_the_scaling():
    first = factors_of(8, 12, 3).lora_A
    assert torch.equal(first, factors_of(8, 12, 3, scaling=16.0).lora_A)
    assert not torch.equal(first, factors_of(8, 12, 3, seed=1).lora_A)
    assert not torch.equal(first, factors_of(8, 12, 3, name="other").lora_A)


def test_a_rank_above_the_inputs_is_refused():
    config = LoraConfig(r=5, target_modules=["0"], init_lora_weights="orthonormal")
    model = torch.nn.Sequential(torch.nn.Linear(4, 9))
    with pytest.raises(ValueError, match=r"orthonormal cannot have rank 5.*must be at most 4"):
        get_peft_model(model, config)
