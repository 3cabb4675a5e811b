"""Synthetic weights have the spectra that they claim."""

import pytest
import torch

from experiments.benchmark import powerlaw
from experiments.benchmark.powerlaw import PowerLaw
from experiments.benchmark.quality import subspace_error


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12), (16, 16)])
def test_weight_has_the_stated_singular_triplets(rows, columns):
    made = PowerLaw(rows, columns, "layer", seed=3)
    weight, k = made.weight(), min(rows, columns)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(values, made.values, rtol=1e-5, atol=1e-7)
    assert float(weight.std()) == pytest.approx(powerlaw.DEVIATION, rel=0.1)
    order = torch.arange(1, k + 1, dtype=torch.float64)
    torch.testing.assert_close(values / values[0], order**-0.7, rtol=1e-4, atol=0)
    for first, last in ((0, 3), (k - 3, k)):
        assert subspace_error(made.left(first, last), left[:, first:last]) < 1e-8
        assert subspace_error(made.right(first, last), right[first:last].T) < 1e-8
    assert torch.equal(weight, made.weight())
    assert not torch.equal(weight, PowerLaw(rows, columns, "other", seed=3).weight())


@pytest.mark.parametrize("size", [7, 8])
def test_both_cosine_transforms_agree(size):
    block = torch.randn(size, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(powerlaw.by_fft(block), powerlaw.cosine_transform(block))
