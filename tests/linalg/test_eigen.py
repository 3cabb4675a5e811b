"""The first and the last eigenpairs of positive semi-definite matrices."""

from __future__ import annotations

import pytest
import torch
from spectra import assert_orthonormal, assert_signs, every_dtype, orthonormal, overlap, seeded

from lora_init.linalg import bottom_eigen, dense, top_eigen

SPECTRA = {
    "decaying": torch.arange(1, 161).double() ** -1.0,
    "low rank": torch.cat([torch.arange(5, 0, -1), torch.zeros(155)]).double(),
    "full rank but one": torch.cat([torch.arange(160, 1, -1), torch.zeros(1)]).double(),
    "identity": torch.ones(160).double(),
    "zero": torch.zeros(160).double(),
    "scalar": torch.tensor([2.0]).double(),
}


@every_dtype
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(
    ("function", "method"),
    [
        (top_eigen, "exact"),
        (top_eigen, "krylov"),
        (bottom_eigen, "exact"),
        (bottom_eigen, "inverse"),
    ],
)
def test_eigenpairs_of_a_known_spectrum(function, method, kind, dtype):
    spectrum = SPECTRA[kind]
    basis = orthonormal(len(spectrum), len(spectrum), 8)
    matrix, rank = ((basis * spectrum) @ basis.T).to(dtype), min(6, len(spectrum))
    values, vectors = function(matrix, rank, method=method)
    assert values.dtype == vectors.dtype == dtype
    assert vectors.shape == (len(spectrum), rank)
    assert (values >= 0).all()
    assert_orthonormal(vectors)
    assert_signs(vectors)
    ordered = spectrum if function is top_eigen else spectrum.flip(0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6 if method == "inverse" else 1e-8
    scale = max(spectrum[0], 1)
    assert (values.double() - ordered[:rank]).abs().max() <= tolerance * scale
    residual = matrix.double() @ vectors.double() - vectors.double() * values.double()
    assert residual.norm(dim=0).max() <= (1e-4 if method == "krylov" else tolerance * scale)
    if function is bottom_eigen and kind in ("decaying", "full rank but one"):
        assert overlap(vectors.double(), basis[:, -rank:]) >= 0.999


@pytest.mark.parametrize("tokens", [4000, 300])
def test_bottom_eigen_of_a_second_moment(tokens, monkeypatch):
    """The inverse is used, both with and without a null space."""
    scales = torch.logspace(0, -4, 800, dtype=torch.float64)
    rows = torch.randn(tokens, 800, generator=seeded(4), dtype=torch.float64) * scales
    moment = rows.T @ rows / tokens
    expected, basis = torch.linalg.eigh(moment)
    monkeypatch.setattr(dense, "eigenpairs", None)
    values, vectors = bottom_eigen(moment, 8, method="inverse")
    assert_orthonormal(vectors)
    if tokens > 800:
        torch.testing.assert_close(values, expected[:8], rtol=1e-6, atol=0)
        assert overlap(vectors, basis[:, :8]) >= 0.999
    else:
        assert (moment @ vectors).norm() <= 1e-13 * expected[-1]


@pytest.mark.parametrize("leading", [True, False])
def test_top_eigen_with_and_without_leading_directions(leading):
    """The spectrum i^-0.1 converges; the second moment of noise falls back to a dense solver."""
    n, rank = 768, 16
    if leading:
        basis = orthonormal(n, n, 12)
        matrix = (basis * torch.arange(1, n + 1).double() ** -0.1) @ basis.T
    else:
        inputs = torch.randn(8 * n, n, generator=seeded(12)).double()
        matrix = inputs.T @ inputs
    values, vectors = torch.linalg.eigh(matrix)
    found = top_eigen(matrix, rank)
    torch.testing.assert_close(found[0], values[-rank:].flip(0), rtol=1e-6, atol=0)
    assert overlap(found[1], vectors[:, -rank:]) >= 0.999
