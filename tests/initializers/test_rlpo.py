"""rlpo and rlmo: the first and last right singular vectors of a full SVD in float64."""

import pytest
import torch
from layers import layer_of
from measures import relative_gap
from models import spread_weight

from lora_init.initializers.rlpo import rlmo, rlpo
from lora_init.registry import Options

RANK = 4
SHAPES = [(40, 40), (96, 24), (24, 96)]
METHODS = {"rlpo": rlpo, "rlmo": rlmo}
every_method = pytest.mark.parametrize("method", METHODS)


def factors_of(method, weight, rank=RANK, scaling=2.0, **settings):
    return METHODS[method](layer_of(weight, rank, scaling, **settings), Options())


def reference(method, weight, rank):
    """Rows of the thin Vᵀ; for rlmo the very last first."""
    right = torch.linalg.svd(weight.double(), full_matrices=False)[2]
    return right[:rank] if method == "rlpo" else right.flip(0)[:rank]


@every_method
@pytest.mark.parametrize("rank", [1, RANK, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_an_end_of_the_full_svd(method, rows, columns, rank, dtype):
    weight = spread_weight(rows, columns).to(dtype)
    factors = factors_of(method, weight, rank)
    expected = reference(method, weight, rank)
    signs = torch.sign((factors.lora_A * expected).sum(1, keepdim=True))
    assert relative_gap(factors.lora_A, signs * expected) < 1e-4
    square = factors.lora_A.double() @ factors.lora_A.double().T
    torch.testing.assert_close(square, torch.eye(rank).double(), rtol=0, atol=1e-6)
    assert factors.lora_B.shape == (rows, rank)
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32
    assert not factors.lora_B.any()


@every_method
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_what_w_does_on_the_rows(method, rows, columns):
    """Also for a wide weight: its null space, where W Aᵀ is zero, is not used."""
    weight = spread_weight(rows, columns)
    values = torch.linalg.svdvals(weight.double())
    chosen = values[:RANK] if method == "rlpo" else values[-RANK:]
    image = weight.double() @ factors_of(method, weight).lora_A.double().T
    assert float(image.norm()) == pytest.approx(float(chosen.norm()), rel=1e-5)


@every_method
def test_neither_scaling_nor_seed_changes_it_and_ranks_nest(method):
    weight = spread_weight(60, 40)
    lora_A = factors_of(method, weight, 12).lora_A
    for rank, scaling, seed in ((12, 1.0, 0), (12, 16.0, 3), (5, 5.66, 0)):
        assert torch.equal(
            factors_of(method, weight, rank, scaling, seed=seed).lora_A, lora_A[:rank]
        )
