"""First triplets alone, by either solver, against whole decompositions."""

import pytest
import torch

from experiments.benchmark import leading, quality


@pytest.mark.parametrize("small", [1024, 8], ids=["LAPACK", "ARPACK"])
@pytest.mark.parametrize("shape", [(40, 70), (70, 40)])
def test_left_vectors(monkeypatch, small, shape):
    monkeypatch.setattr(leading, "SMALL", small)
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left = torch.linalg.svd(matrix, full_matrices=False)[0]
    found = leading.leading_left(matrix, 4)
    cosines = (left[:, :4].T @ found).abs()
    torch.testing.assert_close(cosines, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-8)
    rough = leading.leading_left(matrix, 4, tolerance=1e-2)
    assert quality.excess(matrix, rough @ (rough.T @ matrix), left[:, :4]) < 1e-3


@pytest.mark.parametrize("small", [1024, 8], ids=["LAPACK", "ARPACK"])
def test_eigenvectors(monkeypatch, small):
    monkeypatch.setattr(leading, "SMALL", small)
    rows = torch.randn(90, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, vectors = leading.leading(rows.T @ rows, 3)
    whole = torch.linalg.eigh(rows.T @ rows)
    torch.testing.assert_close(values, whole[0][-3:].flip(0))
    assert quality.overlap(vectors, whole[1][:, -3:]) > 1 - 1e-12


def test_no_more_than_there_are():
    assert leading.leading(torch.eye(3, dtype=torch.float64), 8)[1].shape == (3, 3)
