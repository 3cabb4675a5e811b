"""random_bases: PiSSA's singular values and norms, and bases that know nothing of the weight."""

import pytest
import torch
from layers import layer_of
from models import spread_weight

from lora_init import list_initializers
from lora_init.initializers.random_bases import haar_columns, random_bases
from lora_init.registry import Options


def factors_of(weight, rank, scaling=2.0, seed=0):
    return random_bases(layer_of(weight, rank, scaling, seed=seed), Options())


@pytest.mark.parametrize("shape", [(64, 96), (96, 40)])
@pytest.mark.parametrize("scaling", [1 / 16, 2.0])
def test_the_spectrum_is_pissas_and_the_directions_are_not(shape, scaling):
    weight, rank = spread_weight(*shape), 8
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    factors = factors_of(weight, rank, scaling)
    product = scaling * factors.lora_B.double() @ factors.lora_A.double()
    torch.testing.assert_close(torch.linalg.svdvals(product)[:rank], s[:rank], rtol=1e-4, atol=0)
    balanced = torch.diag(s[:rank] / scaling)
    for gram in (factors.lora_A @ factors.lora_A.T, factors.lora_B.T @ factors.lora_B):
        torch.testing.assert_close(gram.double(), balanced, rtol=1e-4, atol=1e-4)
    # The share of the leading subspace that a random one holds is rank / dimension on average.
    for basis, factor, size in ((vt, factors.lora_A, shape[1]), (u.T, factors.lora_B.T, shape[0])):
        directions = torch.nn.functional.normalize(factor.double(), dim=1)
        share = float((directions @ basis[:rank].T).square().sum() / rank)
        assert share < 3 * rank / size


def test_the_bases_are_orthonormal_and_unbiased():
    drawn = [haar_columns(6, 2, torch.Generator().manual_seed(seed)) for seed in range(400)]
    for basis in drawn[:5]:
        torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64))
    # LAPACK alone would give each column's first entry one sign.
    mean = torch.stack(drawn).mean(0)
    assert float(mean.abs().max()) < 5 * (1 / 6 / 400) ** 0.5


def test_it_is_seeded_by_layer_and_flagged():
    weight = spread_weight(32, 48)
    assert torch.equal(factors_of(weight, 4).lora_A, factors_of(weight, 4).lora_A)
    assert not torch.equal(factors_of(weight, 4).lora_A, factors_of(weight, 4, seed=1).lora_A)
    controls = {spec.name for spec in list_initializers() if spec.control}
    assert controls >= {"random_bases", "matched_norm"}
    assert "control=True" in repr(list_initializers("random_bases")[0])
    assert "control" not in repr(list_initializers("random")[0])
