"""How much work a Krylov space takes, and when it is given up."""

from __future__ import annotations

import pytest
import torch
from spectra import (
    orthonormal,
    overlap,
)

from lora_init.linalg import (
    top_eigen,
)
from lora_init.linalg.krylov import leading_eigenspace, start_block


@pytest.mark.parametrize("products", [0, 12, 32])
def test_a_longer_basis_needs_fewer_products(products):
    """The leading eigenvectors of a spectrum that hardly falls, with a restart after so many."""
    values = 1 / torch.arange(400, 800).double()
    basis = orthonormal(400, 400, 11)
    matrix, count = (basis * values) @ basis.T, 0

    def multiply(block):
        nonlocal count
        count += 1
        return matrix @ block

    block = start_block((400,), 12, None, None, dtype=torch.float64, device=matrix.device)
    found = leading_eigenspace(multiply, block, 4, each=True, rounds=60, products=products)
    assert found.converged
    assert overlap(found.vectors, basis[:, :4]) >= 0.999
    assert count <= {0: 60, 12: 36, 32: 24}[products]


@pytest.mark.parametrize(("spectrum", "converges"), [("slow", True), ("random", False)])
def test_a_space_that_will_not_come_to_rest_is_given_up_early(spectrum, converges):
    """Random inputs' second moment has no leading directions; i^-0.1 hardly has any."""
    n, rank, count = 768, 16, 0
    if spectrum == "slow":
        basis = orthonormal(n, n, 12)
        matrix = (basis * torch.arange(1, n + 1).double() ** -0.1) @ basis.T
    else:
        inputs = torch.randn(8 * n, n, generator=torch.Generator().manual_seed(12)).double()
        matrix = inputs.T @ inputs

    def multiply(block):
        nonlocal count
        count += 1
        return matrix @ block

    block = start_block((n,), rank + 8, None, None, dtype=torch.float64, device=matrix.device)
    patient = leading_eigenspace(multiply, block, rank, each=True)
    whole, count = count, 0
    found = leading_eigenspace(multiply, block, rank, each=True, foresee=True)
    assert patient.converged is found.converged is converges
    assert count == whole if converges else count < whole / 2
    values, vectors = torch.linalg.eigh(matrix)
    chosen = top_eigen(matrix, rank)
    torch.testing.assert_close(chosen[0], values[-rank:].flip(0), rtol=1e-6, atol=0)
    assert overlap(chosen[1], vectors[:, -rank:]) >= 0.999
