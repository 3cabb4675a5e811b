"""The solvers of an accelerator: products in the place of LAPACK's calls, on the CPU."""

from __future__ import annotations

import pytest
import torch
from spectra import (
    ADVERSARIES,
    assert_orthonormal,
    every_adversary,
    every_dtype,
    excess,
    power_law,
    seeded,
    with_spectrum,
)

from lora_init import linalg
from lora_init.linalg import dense, singular
from lora_init.linalg.thin import cholesky_qr, householder_signs, thin_qr


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    """Every device counts as one on which LAPACK is not to be called for each matrix."""
    monkeypatch.setattr(dense, "LAPACK_DEVICES", ())


def blocks(dtype):
    """A stack: well conditioned, badly scaled, ill-conditioned, two equal columns, zero."""
    stack = torch.randn(5, 300, 12, generator=seeded(0), dtype=dtype)
    stack[1] *= torch.logspace(0, -6, 12, dtype=dtype)
    mixed = torch.randn(12, 12, generator=seeded(1), dtype=dtype)
    stack[2] = stack[2] @ (mixed * torch.logspace(0, -4, 12, dtype=dtype)) @ mixed
    stack[3, :, 5] = stack[3, :, 4]
    stack[4] = 0
    return stack


@every_dtype
def test_every_block_of_a_stack_is_decomposed(dtype):
    stack = blocks(dtype)
    assert cholesky_qr(stack)[2].tolist() == [True, True, True, False, False]
    basis, triangle = thin_qr(stack)
    for block, q, r in zip(stack, basis, triangle, strict=True):
        assert_orthonormal(q)
        assert torch.equal(r, r.triu())
        rounding = 10 * torch.finfo(dtype).eps * torch.linalg.matrix_norm(block)
        assert (q @ r - block).abs().max() <= rounding
        alone = thin_qr(block)[0]
        torch.testing.assert_close(alone, q, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


def test_signs_of_householders_method():
    """By which a factor of a QR decomposition is the same on every device."""
    stack = blocks(torch.float64)[:3]
    expected = torch.linalg.qr(stack)[0]
    basis = thin_qr(stack)[0]
    signed = basis * householder_signs(basis)[:, None, :]
    torch.testing.assert_close(signed, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(200, 60), (60, 200)])
def test_leading_columns_are_lapacks(shape, monkeypatch):
    matrix = torch.randn(*shape, generator=seeded(2), dtype=torch.float64)
    found = linalg.leading_qr(matrix, 8)
    monkeypatch.setattr(dense, "LAPACK_DEVICES", ("cpu",))
    for one, other in zip(found, linalg.leading_qr(matrix, 8), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@every_adversary
@every_dtype
@pytest.mark.parametrize("method", ["auto", "krylov"])
def test_first_triplets_are_optimal(name, dtype, method):
    matrix, rank = ADVERSARIES[name]
    matrix = matrix.to(dtype)
    found = linalg.top_singular(matrix, rank, method=method)
    assert_orthonormal(found.left)
    assert_orthonormal(found.right)
    assert excess(matrix, found) <= 1e-4


@every_adversary
def test_last_triplets_are_the_end_of_the_svd(name):
    matrix, rank = ADVERSARIES[name]
    found = linalg.bottom_singular(matrix, rank)
    values = torch.linalg.svdvals(matrix)
    expected = values.flip(0)[:rank]
    assert_orthonormal(found.right)
    assert (found.values - expected).abs().max() <= 1e-7 * values[0]


def test_last_triplets_by_an_inverted_factor():
    """A matrix large enough for a Krylov space of the inverse."""
    scale = torch.linspace(1, 0.1, 300, dtype=torch.float64)
    matrix = torch.randn(400, 300, generator=seeded(3), dtype=torch.float64) * scale
    found = linalg.bottom_singular(matrix, 8, method="inverse")
    assert found.method == "inverse"
    expected = torch.linalg.svdvals(matrix).flip(0)[:8]
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["zero", "rank 3"])
def test_singular_stacks_keep_orthonormal_vectors(kind):
    stack = torch.zeros(3, 24, 24, dtype=torch.float64)
    if kind == "rank 3":
        stack += torch.randn(24, 3, generator=seeded(4)) @ torch.randn(3, 24, generator=seeded(5))
    left, values, right = dense.svd(stack)
    for u, s, v, matrix in zip(left, values, right.mT, stack, strict=True):
        assert_orthonormal(u)
        assert_orthonormal(v)
        assert (u * s @ v.mT - matrix).abs().max() <= 1e-5


@pytest.mark.parametrize("function", ["top_singular", "bottom_singular"])
def test_one_singular_member_does_not_slow_the_others(function, monkeypatch):
    """It is decomposed by a dense solver, which the other members of its stack do without."""
    stack = torch.stack([power_law(400, 300, seed=seed) for seed in (1, 3, 5)])
    stack[1] = with_spectrum(400, 300, torch.ones(3, dtype=torch.float64))
    solved = []
    for owner, name in ((singular, "_gram"), (dense, "svd")):
        original = getattr(owner, name)

        def counted(matrix, *rest, original=original):
            if matrix.shape[-2:].numel() >= 300 * 300:
                solved.append(len(matrix) if matrix.ndim > 2 else 1)
            return original(matrix, *rest)

        monkeypatch.setattr(owner, name, counted)
    method = "krylov" if function == "top_singular" else "inverse"
    found = getattr(linalg, function)(stack, 4, method=method)
    assert set(solved) == {1}
    assert len(solved) <= 2  # squares first, then the matrix itself
    for index, matrix in enumerate(stack):
        values = torch.linalg.svdvals(matrix)
        expected = values[:4] if function == "top_singular" else values.flip(0)[:4]
        assert (found.values[index] - expected).abs().max() <= 1e-6 * values[0]
