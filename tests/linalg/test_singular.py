"""Leading singular triplets against LAPACK's float64 SVD, on spectra chosen to break them."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from spectra import (
    ADVERSARIES,
    assert_orthonormal,
    assert_signs,
    every_adversary,
    every_dtype,
    excess,
    overlap,
    power_law,
    seeded,
    with_spectrum,
)

from lora_init.linalg import (
    Operator,
    top_singular,
)

pytestmark = pytest.mark.sampled(3)


@every_adversary
@every_dtype
@pytest.mark.parametrize("method", ["exact", "gram", "gram-krylov", "krylov"])
def test_top_singular_is_optimal(name, dtype, method):
    matrix, rank = ADVERSARIES[name]
    matrix = matrix.to(dtype)
    kept = matrix.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = top_singular(matrix, rank, method=method)
    assert torch.equal(matrix, kept)
    assert found.left.shape == (matrix.shape[0], rank)
    assert found.right.shape == (matrix.shape[1], rank)
    assert found.left.dtype == found.values.dtype == found.right.dtype == dtype
    assert_orthonormal(found.left)
    assert_orthonormal(found.right)
    assert_signs(found.left)
    assert (found.values.diff() <= 0).all()
    assert excess(matrix, found) <= 1e-4

    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    scale = values[0].item()
    # 64: the reference itself is off by 35 float64 epsilons on the constant matrix.
    tolerance = 1e-3 if "krylov" in found.method else 64 * torch.finfo(dtype).eps
    assert (found.values.double() - values[:rank]).abs().max() <= tolerance * scale
    # The Gram matrix loses digits of the vectors of small values, squared.
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-11}[dtype]
    assert found.residual <= (2e-2 if "krylov" in found.method else tolerance)
    gap = rank < len(values) and values[rank] < 0.9 * values[rank - 1]
    if gap and values[rank - 1] > 1e-4 * scale:
        assert overlap(found.left, left[:, :rank]) >= 0.999
        assert overlap(found.right, right[:rank].T) >= 0.999


@pytest.mark.parametrize("exponent", [0.3, 0.7, 1.2, 6.0])
@every_dtype
@pytest.mark.parametrize(("large", "method"), [(256, "krylov"), (1024, "gram-krylov")])
def test_krylov_converges_where_auto_uses_it(monkeypatch, exponent, dtype, large, method):
    monkeypatch.setattr("lora_init.linalg.dense.GRAM_DIMENSION", large)
    matrix = power_law(500, 400, exponent).to(dtype)
    found = top_singular(matrix, 8, generator=torch.Generator().manual_seed(0))
    # float64 resolves more than squares can tell: the steepest spectrum goes to LAPACK.
    steep = dtype == torch.float64 and exponent == 6.0
    assert found.method == ("exact" if steep else method)
    assert excess(matrix, found) <= 1e-6
    left = torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, :8]
    assert overlap(found.left, left) >= 0.999


@pytest.mark.parametrize("method", ["auto", "krylov"])
def test_same_result_twice_and_from_the_generator_only(method):
    matrix = power_law(300, 250).float()
    torch.manual_seed(1)
    first = top_singular(matrix, 8, method=method)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = top_singular(matrix, 8, method=method)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.right, second.right)
    assert torch.equal(torch.get_rng_state(), state)
    third = top_singular(matrix, 8, method="subspace", niter=1, generator=seeded(1))
    fourth = top_singular(matrix, 8, method="subspace", niter=1, generator=seeded(2))
    again = top_singular(matrix, 8, method="subspace", niter=1, generator=seeded(1))
    assert torch.equal(third.right, again.right)
    assert not torch.equal(third.right, fourth.right)
    assert again.method == "subspace"


def test_niter_counts_power_iterations():
    products = 0
    matrix = power_law(60, 80)

    def count(block):
        nonlocal products
        products += 1
        return matrix @ block

    operator = Operator((60, 80), count, lambda b: matrix.T @ b, matrix.dtype, matrix.device)
    calls = []
    for niter in (0, 1, 5):
        products = 0
        top_singular(operator, 4, method="subspace", niter=niter)
        calls.append(products)
    assert calls[1] - calls[0] == 1
    assert calls[2] - calls[0] == 5


@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_start_warms_up(method):
    matrix = power_law(300, 260)
    change = torch.randn(300, 260, generator=seeded(9), dtype=torch.float64)
    changed = matrix + 1e-3 * change / change.norm()
    known = top_singular(matrix, 8, method="exact").right
    niter = 1 if method == "subspace" else None
    cold = top_singular(changed, 8, method=method, niter=niter)
    warm = top_singular(changed, 8, method=method, niter=niter, start=known)
    assert excess(changed, warm) <= 1e-6
    if method == "subspace":
        assert excess(changed, warm) < excess(changed, cold) / 100
    zero_start = top_singular(changed, 8, method=method, niter=niter, start=0 * known)
    assert_orthonormal(zero_start.left)


@every_dtype
@pytest.mark.parametrize("method", ["exact", "gram", "krylov"])
@pytest.mark.parametrize("shape", [(200, 150), (150, 200)])
def test_product_operator_is_the_dense_product(shape, method, dtype):
    weight = power_law(*shape, 0.5).to(dtype)
    inputs = torch.randn(400, shape[1], generator=seeded(4), dtype=torch.float64)
    inputs = inputs * torch.linspace(2, 0.3, shape[1]).double()
    moment = (inputs.T @ inputs / 400).to(dtype)
    dense = weight.double() @ moment.double()
    operator = Operator.product(weight, moment)
    assert operator.shape == shape
    torch.testing.assert_close(operator.to_dense().double(), dense, rtol=0, atol=1e-5)
    found = top_singular(operator, 8, method=method)
    assert excess(dense, found) <= 1e-4
    left = torch.linalg.svd(dense, full_matrices=False)[0][:, :8]
    assert overlap(found.left, left) >= 0.999


@pytest.mark.parametrize("upcast", [True, False])
def test_steep_operator_is_finished_in_float64(monkeypatch, upcast):
    monkeypatch.setattr("lora_init.linalg.dense.DENSE_DIMENSION", 64)
    weight = power_law(300, 260, 0.5).float()
    moment = with_spectrum(260, 260, torch.arange(1, 261).double() ** -2)
    moment = (moment @ moment.T).float()  # s_i = i^-4: float32 loses the tail's energy
    operator = Operator.product(weight, moment)
    if not upcast:
        operator = replace(operator, upcast=None)
    found = top_singular(operator, 8)
    assert found.method == ("krylov" if upcast else "gram")
    dense = weight.double() @ moment.double()
    assert excess(dense, found) <= 1e-4
    left = torch.linalg.svd(dense, full_matrices=False)[0][:, :8]
    assert overlap(found.left, left) >= 0.999
