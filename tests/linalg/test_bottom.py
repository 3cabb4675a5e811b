"""The last singular triplets, of weights and of products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from spectra import (
    assert_orthonormal,
    assert_signs,
    every_dtype,
    orthonormal,
    overlap,
    power_law,
    seeded,
    with_spectrum,
)

from lora_init.linalg import Operator, bottom_singular


@pytest.mark.parametrize(
    ("name", "matrix", "method"),
    [
        ("square", power_law(90, 90), "gram"),
        ("tall", power_law(200, 60), "gram"),
        ("wide", power_law(60, 200), "gram"),
        ("rank-deficient tall", with_spectrum(120, 80, torch.arange(1, 71)), "exact"),
        ("rank-deficient wide", with_spectrum(80, 120, torch.arange(1, 71)), "exact"),
        ("condition 1e12", with_spectrum(70, 70, torch.logspace(0, -12, 70)), "exact"),
        ("zero", torch.zeros(20, 30, dtype=torch.float64), "exact"),
        ("one row", torch.ones(1, 30, dtype=torch.float64), "gram"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@every_dtype
def test_bottom_singular_is_the_end_of_the_thin_svd(name, matrix, method, dtype):
    matrix = matrix.to(dtype)
    rank = min(6, *matrix.shape)
    found = bottom_singular(matrix, rank)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    left, values, right = left[:, -rank:].flip(1), values[-rank:].flip(0), right[-rank:].flip(0).T
    if dtype == torch.float64:  # float32's rounding fills a null space
        assert found.method == method
    assert found.left.dtype == dtype
    assert found.left.shape == (matrix.shape[0], rank)
    assert (found.values.diff() >= 0).all()
    assert_orthonormal(found.left)
    assert_orthonormal(found.right)
    assert_signs(found.left)
    scale = torch.linalg.svdvals(matrix.double())[0].item()
    epsilon = torch.finfo(dtype).eps
    assert (found.values.double() - values).abs().max() <= 10 * epsilon * scale
    assert found.residual <= 1e-9
    # Both sides, also for null directions: the wrong side's null space would fail here.
    image = matrix.double().T @ found.left.double() - found.right.double() * found.values.double()
    assert image.norm(dim=0).max() <= 20 * epsilon * scale
    if values[0] > 1e-6 * scale:
        assert overlap(found.left, left) >= 0.999
        assert overlap(found.right, right) >= 0.999


@pytest.mark.parametrize("shape", [(320, 300), (300, 320), (300, 300)])
@pytest.mark.parametrize("as_product", [True, False])
def test_bottom_of_a_steep_product(shape, as_product):
    """Values down to 1e-9 s_1 and below: a product must not amplify what is left of v_1."""
    weight = power_law(*shape, 0.5)
    values = torch.logspace(0, -9, shape[1], dtype=torch.float64)
    basis = orthonormal(shape[1], shape[1], 3)
    moment = (basis * values) @ basis.T
    moment = (moment + moment.T) / 2
    product = Operator.product(weight, moment) if as_product else weight @ moment
    found = bottom_singular(product, 8)
    assert found.method == "inverse"
    left, values, right = torch.linalg.svd(weight @ moment, full_matrices=False)
    assert overlap(found.left, left[:, -8:]) >= 0.999
    assert overlap(found.right, right[-8:].T) >= 0.999
    torch.testing.assert_close(found.values, values[-8:].flip(0), rtol=1e-3, atol=0)
    assert values[0] / 2 <= found.largest <= values[0] * (1 + 1e-12)


FLAT_AND_SMALL = 1e-8 * (1 + 0.05 * torch.arange(199, -1, -1).double() / 200)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("name", "matrix", "method"),
    [
        ("steep for squares", torch.cat([torch.logspace(0, -3, 200).double(), FLAT_AND_SMALL]),
         "inverse"),
        ("partial solver", torch.linspace(2, 0.1, 400).double(), "gram"),
        ("flat", torch.arange(1, 301).double() ** -0.3, "inverse"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bottom_without_a_whole_decomposition(name, matrix, method, wide, monkeypatch):
    """A flat end far down needs a dense solver of the inverse; i^-0.3 needs a shift."""
    matrix = with_spectrum(len(matrix) + 20, len(matrix), matrix)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    monkeypatch.setattr(torch.linalg, "svd", only_small(torch.linalg.svd))
    found = bottom_singular(matrix.T if wide else matrix, 16)
    found = replace(found, left=found.right, right=found.left) if wide else found
    assert found.method == method
    assert overlap(found.left, left[:, -16:]) >= 0.999
    assert overlap(found.right, right[-16:].T) >= 0.999
    torch.testing.assert_close(found.values, values[-16:].flip(0), rtol=1e-6, atol=0)


def only_small(function):
    def guarded(matrix, *arguments, **settings):
        assert min(matrix.shape[-2:]) < 100, "a whole decomposition"
        return function(matrix, *arguments, **settings)

    return guarded


def test_bottom_of_a_random_weight():
    matrix = torch.randn(700, 400, generator=seeded(8))
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = bottom_singular(matrix, 16)
    assert overlap(found.left, left[:, -16:]) >= 0.999
    assert (found.values - values[-16:].flip(0)).abs().max() <= 1e-6 * values[0]
