"""The Frobenius norm of matrices of every shape, layout and precision."""

import pytest
import torch

from lora_init.linalg import frobenius_norm


@pytest.mark.parametrize(
    "shape", [(1408, 1024), (3, 40_000), (40_000, 3), (2, 7, 5), (0, 4)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_frobenius_norm(shape, dtype, turned):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    matrix = matrix.mT if turned else matrix
    norm = frobenius_norm(matrix)
    assert norm.dtype == torch.float64
    expected = matrix.double().square().sum((-2, -1)).sqrt()
    tolerance = 1e-6 if dtype == torch.bfloat16 else 1e-7
    torch.testing.assert_close(norm, expected, rtol=tolerance, atol=0)
