"""Matrices of known spectra, some chosen to break a decomposition, and measures of a result."""

from __future__ import annotations

import math

import pytest
import torch

from lora_init import linalg


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    block = torch.randn(rows, columns, generator=seeded(seed), dtype=torch.float64)
    return torch.linalg.qr(block)[0]


def with_spectrum(m: int, n: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    count = len(values)
    left, right = orthonormal(m, count, seed), orthonormal(n, count, seed + 1)
    return (left * values.double()) @ right.T


def power_law(m: int, n: int, exponent: float = 0.7, seed: int = 0) -> torch.Tensor:
    return with_spectrum(m, n, torch.arange(1, min(m, n) + 1).double() ** -exponent, seed)


def clustered() -> torch.Tensor:
    values = torch.cat([torch.ones(10), 1 - 1e-6 * torch.arange(10), torch.full((76,), 0.5)])
    return with_spectrum(96, 128, values)


def one_outlier() -> torch.Tensor:
    matrix = torch.randn(96, 128, generator=seeded(3), dtype=torch.float64)
    matrix[17, 40] = 1e6
    return matrix


def constant_columns() -> torch.Tensor:
    return torch.ones(130, 96, dtype=torch.float64)


# name: (matrix in float64, rank)
ADVERSARIES = {
    "power law": (power_law(160, 200), 8),
    "gaussian": (torch.randn(200, 160, generator=seeded(5), dtype=torch.float64), 8),
    "identity": (torch.eye(128, dtype=torch.float64), 8),
    "flat": (with_spectrum(96, 160, torch.ones(96)), 8),
    "clustered": (clustered(), 8),
    "cluster cut in two": (clustered(), 20),
    "exactly low rank": (with_spectrum(160, 120, torch.arange(1, 7)), 6),
    "rank-deficient": (with_spectrum(160, 120, torch.arange(1, 7)), 12),
    "constant": (constant_columns(), 4),
    "zero": (torch.zeros(60, 90, dtype=torch.float64), 5),
    "one outlier": (one_outlier(), 8),
    "condition 1e12": (with_spectrum(120, 120, torch.logspace(0, -12, 120)), 16),
    "condition 1e12, deep": (with_spectrum(120, 120, torch.logspace(0, -12, 120)), 100),
    "one row": (torch.randn(1, 50, generator=seeded(6), dtype=torch.float64), 1),
    "one column": (torch.randn(50, 1, generator=seeded(7), dtype=torch.float64), 1),
    "scalar": (torch.full((1, 1), -3.0, dtype=torch.float64), 1),
    "tall": (power_law(600, 40), 6),
    "wide": (power_law(40, 600), 6),
    "full rank": (power_law(30, 50), 30),
    "tiny values": (power_law(100, 100) * 1e-15, 8),
    "large values": (power_law(100, 100) * 1e15, 8),
}
every_adversary = pytest.mark.parametrize("name", ADVERSARIES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def squared_tail(values: torch.Tensor, rank: int) -> float:
    return math.sqrt(values[rank:].square().sum().item())


def approximation_error(matrix: torch.Tensor, found: linalg.Decomposition) -> float:
    product = (found.left.double() * found.values.double()) @ found.right.double().T
    return torch.linalg.norm(matrix.double() - product).item()


def excess(matrix: torch.Tensor, found: linalg.Decomposition) -> float:
    """Return the relative Frobenius error over the optimum, less the rounding of the factors."""
    matrix = matrix.double()
    optimum = squared_tail(torch.linalg.svdvals(matrix), found.values.numel())
    size = torch.linalg.norm(matrix).item() * math.sqrt(sum(matrix.shape))
    rounding = 4 * torch.finfo(found.left.dtype).eps * size
    return max(0.0, approximation_error(matrix, found) - rounding - optimum) / max(optimum, 1e-300)


def assert_orthonormal(block: torch.Tensor) -> None:
    gram = block.double().T @ block.double()
    deviation = (gram - torch.eye(block.shape[1], dtype=torch.float64)).abs().max().item()
    assert deviation < 10 * math.sqrt(block.shape[0]) * torch.finfo(block.dtype).eps


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first.double().T @ second.double()).square().sum() / first.shape[1]).item()


def assert_signs(left: torch.Tensor) -> None:
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) >= 0).all()
