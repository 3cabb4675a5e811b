"""milora: the last r singular triplets, by full SVDs in float64."""

import pytest
import torch
from layers import layer_of, product, settings_of_scalings
from measures import relative_gap
from models import spread_weight

from lora_init.initializers.milora import milora
from lora_init.registry import Options

RANK = 4
SHAPES = [(40, 40), (96, 24), (24, 96)]
SCALINGS = settings_of_scalings(RANK)


def factors_of(weight, rank=RANK, scaling=2.0, seed=0):
    return milora(layer_of(weight, rank, scaling, seed=seed), Options())


def last_triplets(weight, rank=RANK):
    """Ascending."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return (part.flip(0)[:rank] for part in (left.T, values, right))


def minor_part(weight, rank=RANK):
    left, values, right = last_triplets(weight, rank)
    return (left.T * values) @ right


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_end_of_the_full_svd(rows, columns, scaling):
    weight = spread_weight(rows, columns)
    factors = factors_of(weight, scaling=scaling)
    assert relative_gap(product(factors, scaling), minor_part(weight)) < 1e-5
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32
    # Balanced: row i of A is ± sqrt(S_i / s) v_i and column i of B alike, the smallest first.
    left, values, right = last_triplets(weight)
    root = (values / scaling).sqrt()[:, None]
    for grown, basis in ((factors.lora_A.double(), right), (factors.lora_B.double().T, left)):
        signs = torch.sign((grown * basis).sum(1, keepdim=True))
        assert relative_gap(grown, signs * root * basis) < 1e-4


@pytest.mark.parametrize(("rows", "columns"), [(420, 320), (320, 500)])
def test_is_the_end_of_the_full_svd_where_inverses_answer(rows, columns):
    weight = spread_weight(rows, columns)
    factors = factors_of(weight, rank=8)
    assert factors.metrics["algorithm"] == "inverse"
    assert relative_gap(product(factors), minor_part(weight, 8)) < 1e-4


def test_a_tall_weight_does_not_give_its_null_space():
    """The smallest eigenvectors of W Wᵀ are W's left null space, where s B A would vanish."""
    weight = spread_weight(96, 24)
    smallest = torch.linalg.svdvals(weight.double())[-RANK:]
    assert float(product(factors_of(weight)).norm()) == pytest.approx(float(smallest.norm()))


@pytest.mark.parametrize("rank", [1, 24])
def test_lowest_and_full_rank(rank):
    weight = spread_weight(24, 60)
    gap = product(factors_of(weight, rank)) - minor_part(weight, rank)
    assert gap.norm() < 2e-6 * weight.norm()


def test_factors_nest():
    weight = spread_weight(60, 40)
    wide, narrow = factors_of(weight, 12), factors_of(weight, 5)
    assert torch.equal(wide.lora_A[:5], narrow.lora_A)
    assert torch.equal(wide.lora_B[:, :5], narrow.lora_B)


def test_same_factors_from_any_seed():
    weight = spread_weight(60, 40)
    first, second = factors_of(weight), factors_of(weight.clone(), seed=7)
    assert torch.equal(first.lora_A, second.lora_A)
    assert torch.equal(first.lora_B, second.lora_B)


def test_components_without_a_value_are_counted():
    weight = spread_weight(40, 24)
    weight[:, 3:6] = 0.0
    factors = factors_of(weight, rank=8)
    assert int(factors.metrics["vanishing_components"].sum()) == 3
    assert factors.lora_A[:3].norm() < 1e-3 * factors.lora_A[3:].norm()
    assert relative_gap(product(factors), minor_part(weight, 8)) < 1e-4
    assert int(factors_of(spread_weight(40, 24)).metrics["vanishing_components"].sum()) == 0
