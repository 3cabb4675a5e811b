"""geora: the masks by sorting, and a full SVD, in float64."""

import pytest
import torch
from layers import layer_of
from measures import relative_gap
from models import spread_weight

from lora_init import LoraConfig
from lora_init.initializers.geora import GeoraOptions, geora
from lora_init.initializers.pissa import PissaOptions, pissa

RANK = 4
TEXT = pytest.param("0.2", marks=pytest.mark.wrong_types)
SHAPES = [(40, 40), (96, 24), (24, 96)]


def factors_of(weight, rank=RANK, scaling=2.0, **options):
    return geora(layer_of(weight, rank, scaling), GeoraOptions(**options))


def best(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def masked(weight, rank, fraction):
    """W on the union of the smallest entries of its rank-r part and its own smallest entries."""
    weight = weight.double()

    def lowest(sizes):
        ordered = sizes.flatten().sort().values
        return sizes <= ordered[int(fraction * (len(ordered) - 1))]

    return weight * (lowest(best(weight, rank).abs()) | lowest(weight.abs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 5.66, 16.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_principal_part_of_the_masked_weight(rows, columns, scaling, dtype):
    weight = spread_weight(rows, columns).to(dtype)
    factors = factors_of(weight, scaling=scaling)
    expected = masked(weight, RANK, 0.2)
    product = scaling * factors.lora_B.double() @ factors.lora_A.double()
    assert relative_gap(product, best(expected, RANK)) < 1e-4
    values = torch.linalg.svdvals(expected)[:RANK]
    for gram in (factors.lora_A @ factors.lora_A.T, factors.lora_B.T @ factors.lora_B):
        assert relative_gap(gram, torch.diag(values / scaling)) < 1e-4
    share = float((expected != 0).double().mean())
    assert float(factors.metrics["kept_entries"]) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(("rank", "fraction"), [(24, 0.2), (1, 0.01), (RANK, 0.7)])
def test_other_ranks_and_fractions(rank, fraction):
    weight = spread_weight(24, 60)
    factors = factors_of(weight, rank, fraction=fraction)
    product = 2.0 * factors.lora_B.double() @ factors.lora_A.double()
    assert relative_gap(product, best(masked(weight, rank, fraction), rank)) < 1e-4


def test_all_entries_give_pissa():
    weight = spread_weight(60, 40)
    ours, theirs = factors_of(weight, fraction=1.0), pissa(layer_of(weight, RANK), PissaOptions())
    assert torch.equal(ours.lora_A, theirs.lora_A)
    assert torch.equal(ours.lora_B, theirs.lora_B)


def test_more_entries_than_torch_quantile_accepts():
    """The threshold of 2^24 + 2^12 entries, without the decompositions."""
    from lora_init.initializers.geora import smallest

    sizes = torch.arange(2**24 + 2**12, dtype=torch.float32).view(2**12, -1)
    kept = int(smallest(sizes, 0.25).sum())
    assert kept == pytest.approx(0.25 * sizes.numel(), rel=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 1.5, float("nan"), TEXT, True])
def test_a_bad_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match=r"geora: fraction=.*must be a number > 0 and <= 1"):
        LoraConfig(init_lora_weights={"name": "geora", "fraction": fraction})
