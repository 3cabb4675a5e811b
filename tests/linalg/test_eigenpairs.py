"""The first and the last eigenpairs of positive semi-definite matrices."""

from __future__ import annotations

import pytest
import torch
from spectra import (
    assert_orthonormal,
    assert_signs,
    every_dtype,
    orthonormal,
    overlap,
    seeded,
)

from lora_init.linalg import (
    bottom_eigen,
    eigen,
    top_eigen,
)


@every_dtype
@pytest.mark.parametrize("method", ["auto", "exact", "krylov"])
@pytest.mark.parametrize("kind", ["decaying", "low rank", "identity", "zero", "scalar"])
def test_top_eigen(kind, method, dtype):
    basis = orthonormal(160, 160, 8)
    spectra = {
        "decaying": torch.arange(1, 161).double() ** -1.0,
        "low rank": torch.cat([torch.arange(5, 0, -1), torch.zeros(155)]).double(),
        "identity": torch.ones(160).double(),
        "zero": torch.zeros(160).double(),
    }
    if kind == "scalar":
        matrix, rank = torch.full((1, 1), 2.0, dtype=dtype), 1
        spectrum = torch.tensor([2.0]).double()
    else:
        spectrum = spectra[kind]
        matrix, rank = ((basis * spectrum) @ basis.T).to(dtype), 6
    values, vectors = top_eigen(matrix, rank, method=method)
    assert values.dtype == vectors.dtype == dtype
    assert vectors.shape == (len(spectrum), rank)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(values.double(), spectrum[:rank], rtol=0, atol=10 * tolerance)
    assert (values >= 0).all()
    assert_orthonormal(vectors)
    assert_signs(vectors)
    residual = matrix.double() @ vectors.double() - vectors.double() * values.double()
    assert residual.norm(dim=0).max() <= (1e-4 if method == "krylov" else 10 * tolerance)


@every_dtype
@pytest.mark.parametrize("method", ["auto", "exact", "inverse"])
@pytest.mark.parametrize("kind", ["decaying", "low rank", "full rank but one", "identity", "zero"])
def test_bottom_eigen(kind, method, dtype):
    spectrum = {
        "decaying": torch.arange(1, 161).double() ** -1.0,
        "low rank": torch.cat([torch.arange(5, 0, -1), torch.zeros(155)]).double(),
        "full rank but one": torch.cat([torch.arange(160, 1, -1), torch.zeros(1)]).double(),
        "identity": torch.ones(160).double(),
        "zero": torch.zeros(160).double(),
    }[kind]
    basis = orthonormal(160, 160, 8)
    matrix, rank = ((basis * spectrum) @ basis.T).to(dtype), 6
    values, vectors = bottom_eigen(matrix, rank, method=method)
    assert values.dtype == vectors.dtype == dtype
    assert vectors.shape == (160, rank)
    assert (values >= 0).all()
    assert_orthonormal(vectors)
    assert_signs(vectors)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6 if method == "inverse" else 1e-9
    smallest = spectrum.flip(0)[:rank]
    torch.testing.assert_close(values.double(), smallest, rtol=0, atol=tolerance * spectrum[0])
    residual = matrix.double() @ vectors.double() - vectors.double() * values.double()
    assert residual.norm(dim=0).max() <= tolerance * max(spectrum[0], 1)
    if kind in ("decaying", "full rank but one"):
        assert overlap(vectors.double(), basis[:, -rank:]) >= 0.999


@pytest.mark.parametrize("tokens", [4000, 300])
def test_bottom_eigen_of_a_second_moment(tokens, monkeypatch):
    """By an inverse, whether all directions are used or fewer than there are."""
    scales = torch.logspace(0, -4, 800, dtype=torch.float64)
    rows = torch.randn(tokens, 800, generator=seeded(4), dtype=torch.float64) * scales
    moment = rows.T @ rows / tokens
    expected, basis = torch.linalg.eigh(moment)
    monkeypatch.setattr(eigen, "eigenpairs", None)  # no whole decomposition
    values, vectors = bottom_eigen(moment, 8, method="inverse")
    assert_orthonormal(vectors)
    if tokens > 800:
        torch.testing.assert_close(values, expected[:8], rtol=1e-6, atol=0)
        assert overlap(vectors, basis[:, :8]) >= 0.999
    else:
        assert (moment @ vectors).norm() <= 1e-13 * expected[-1]


def test_one_member_of_a_stack_needs_a_dense_solver(monkeypatch):
    """It alone gets one: the others keep what the iteration found."""
    basis = orthonormal(300, 300, 3)
    falling = (basis * torch.arange(1, 301).double() ** -1.5) @ basis.T
    flat = (basis * (1 + 1e-9 * torch.arange(300).double())) @ basis.T
    sizes, solve = [], eigen.eigenpairs
    monkeypatch.setattr(
        eigen,
        "eigenpairs",
        lambda matrix, *where: sizes.append(matrix.shape) or solve(matrix, *where),
    )
    values, vectors = top_eigen(torch.stack([falling, flat]), 4, method="krylov")
    assert sizes == [flat.shape]
    for index, matrix in enumerate([falling, flat]):
        alone = top_eigen(matrix, 4, method="krylov")
        torch.testing.assert_close(values[index], alone[0], rtol=0, atol=1e-12)
        assert torch.equal(vectors[index], alone[1])
