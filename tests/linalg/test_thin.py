"""The solvers of an accelerator, and stacks: on the CPU, by products instead of LAPACK's calls."""

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
from lora_init.linalg import dense
from lora_init.linalg.thin import cholesky_qr, householder_signs, thin_qr

pytestmark = pytest.mark.sampled(3)


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    """Treat every device as one that does not call LAPACK for each matrix."""
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


def test_signs_are_those_of_householders_method():
    stack = blocks(torch.float64)[:3]
    expected = torch.linalg.qr(stack)[0]
    basis = thin_qr(stack)[0]
    signed = basis * householder_signs(basis)[:, None, :]
    torch.testing.assert_close(signed, expected, rtol=0, atol=1e-8)


@every_dtype
@pytest.mark.parametrize("lapack", [True, False])
@pytest.mark.parametrize("shape", [(120, 80), (80, 120), (6, 9), (1, 9), (9, 1)])
def test_leading_qr_is_the_beginning_of_the_whole_one(shape, lapack, dtype, monkeypatch):
    monkeypatch.setattr(dense, "LAPACK_DEVICES", ("cpu",) * lapack)
    matrix = torch.randn(*shape, generator=seeded(2), dtype=torch.float64).to(dtype)
    rank = min(6, *shape)
    basis, triangle = linalg.leading_qr(matrix, rank)
    whole_basis, whole_triangle = torch.linalg.qr(matrix)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(basis, whole_basis[:, :rank], rtol=0, atol=tolerance)
    torch.testing.assert_close(triangle, whole_triangle[:rank], rtol=tolerance, atol=tolerance)
    assert torch.equal(triangle[:, :rank], triangle[:, :rank].triu())


@every_adversary
@every_dtype
@pytest.mark.parametrize("method", ["gram", "krylov"])
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
    assert_orthonormal(found.right)
    assert (found.values - values.flip(0)[:rank]).abs().max() <= 1e-7 * values[0]


def test_last_triplets_by_an_inverted_factor():
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


@pytest.mark.parametrize("kind", ["first", "last", "product", "eigen"])
def test_only_the_failing_member_of_a_stack_falls_back(kind, monkeypatch):
    """The other members keep the result that they have alone."""
    members = [power_law(400, 300, seed=1), power_law(400, 300, seed=5)]
    members.insert(1, with_spectrum(400, 300, torch.ones(3, dtype=torch.float64)))
    if kind == "product":
        members[1] = with_spectrum(400, 300, 1 - 1e-3 * torch.arange(300) / 300)
    if kind == "eigen":
        members[1] = with_spectrum(400, 300, 1 + 1e-9 * torch.arange(300).double())
        members = [m.T @ m for m in members]
    stack = torch.stack(members)

    def decompose(some):
        if kind == "first":
            return linalg.top_singular(some, 4, method="krylov")
        if kind == "last":
            return linalg.bottom_singular(some, 4, method="inverse")
        if kind == "eigen":
            return linalg.top_eigen(some, 4, method="krylov")
        identity = torch.eye(300, dtype=torch.float64).expand(*some.shape[:-2], -1, -1)
        maps = linalg.Operator.product(some, identity)
        return linalg.top_singular(maps, 4, method="krylov", tolerance=1e-12)

    sizes = []
    for name in ("eigenpairs", "svd"):
        solve = getattr(dense, name)

        def counted(matrix, *rest, solve=solve):
            if matrix.shape[-1] >= 300:
                sizes.append(matrix.shape[:-2].numel())
            return solve(matrix, *rest)

        monkeypatch.setattr(dense, name, counted)
    found = decompose(stack)
    assert sizes
    assert set(sizes) == {1}
    for index, matrix in enumerate(stack):
        alone = decompose(matrix)
        values = found[0] if kind == "eigen" else found.values
        expected = alone[0] if kind == "eigen" else alone.values
        torch.testing.assert_close(values[index], expected, rtol=1e-9, atol=1e-9)
