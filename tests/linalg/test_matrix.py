"""Norms, finiteness and products of matrices as large as weights."""

import pytest
import torch

from lora_init.linalg import frobenius_norm, matrix


@pytest.mark.parametrize(
    "shape", [(1408, 1024), (3, 40_000), (40_000, 3), (2, 7, 5), (0, 4)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_frobenius_norm(shape, dtype, turned):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    values = values.mT if turned else values
    norm = frobenius_norm(values)
    assert norm.dtype == torch.float64
    expected = values.double().square().sum((-2, -1)).sqrt()
    tolerance = 1e-6 if dtype == torch.bfloat16 else 1e-7
    torch.testing.assert_close(norm, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_makes_a_matrix_non_finite(dtype, value):
    numbers = torch.randn(7, 33).to(dtype)
    assert matrix.is_finite(numbers)
    numbers[6, 32] = value
    assert not matrix.is_finite(numbers)


def test_large_finite_numbers_are_finite():
    largest = torch.full((64, 64), torch.finfo(torch.float32).max)
    assert torch.isinf(largest.sum())
    assert matrix.is_finite(largest)
