"""olora: the leading part of the full QR decomposition."""

import pytest
import torch
from layers import layer_of
from models import spread_weight

from lora_init.initializers.olora import olora
from lora_init.registry import Options


def factors_of(weight, rank, scaling=2.0):
    return olora(layer_of(weight, rank, scaling), Options())


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (96, 40), (40, 96), (24, 160)])
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_is_the_full_qr(rows, columns, rank):
    """Signs included: LAPACK's, as in the official code."""
    weight = spread_weight(rows, columns)
    q, r = torch.linalg.qr(weight.double())
    factors = factors_of(weight, rank)
    torch.testing.assert_close(factors.lora_B.double(), q[:, :rank], rtol=0, atol=2e-5)
    torch.testing.assert_close(factors.lora_A.double(), r[:rank], rtol=0, atol=2e-5)
    product = factors.lora_B.double() @ factors.lora_A.double()
    expected = q[:, :rank] @ r[:rank]
    assert (product - expected).norm() < 1e-6 * weight.norm()


def test_shape_of_the_factors():
    weight = spread_weight(48, 64)
    factors = factors_of(weight, 8)
    identity = factors.lora_B.T @ factors.lora_B
    torch.testing.assert_close(identity, torch.eye(8), rtol=0, atol=1e-5)
    assert torch.equal(factors.lora_A[:, :8].tril(-1), torch.zeros(8, 8))
    # The product restores the first r columns of W, whatever the other columns are.
    product = factors.lora_B @ factors.lora_A
    torch.testing.assert_close(product[:, :8], weight[:, :8], rtol=0, atol=1e-5)


def test_scaling_does_not_enter_the_factors():
    weight = spread_weight(32, 48)
    small, large = factors_of(weight, 4, 1 / 16), factors_of(weight, 4, 16.0)
    assert torch.equal(small.lora_A, large.lora_A)
    assert torch.equal(small.lora_B, large.lora_B)


def test_dependent_leading_columns():
    weight = spread_weight(32, 48)
    weight[:, 1] = weight[:, 0]
    weight[:, 2] = 0
    factors = factors_of(weight, 6)
    identity = factors.lora_B.T @ factors.lora_B
    torch.testing.assert_close(identity, torch.eye(6), rtol=0, atol=1e-5)
    product = factors.lora_B @ factors.lora_A
    torch.testing.assert_close(product[:, :6], weight[:, :6], rtol=0, atol=1e-5)
