"""Norms, finiteness and products of matrices as large as weights."""

import copy

import pytest
import torch
from measures import assert_unchanged, snapshot
from torch import nn

from lora_init import LoraConfig, get_peft_model
from lora_init.factors import low_rank_product
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


@pytest.mark.parametrize("method", ["pissa", "milora", "olora", "loftq", "kaiming", "orthogonal"])
def test_only_methods_that_read_weights_check_them(method):
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    with torch.no_grad():
        model[1].weight[3, 4] = float("inf")
    before = snapshot(model)
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=method)
    if method in ("kaiming", "orthogonal"):
        assert get_peft_model(model, config).layers["1"].lora_A.isfinite().all()
        return
    with pytest.raises(ValueError, match=r"target '1': its weight holds NaN or infinite values"):
        get_peft_model(model, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (1500, 1501)], ids=str)
def test_new_memory_is_a_tensor_like_any_other(shape, dtype):
    block = matrix.empty(shape, dtype, torch.device("cpu"))
    assert block.shape == shape
    assert block.dtype == dtype
    assert block.is_contiguous()
    assert block.data_ptr() % matrix.ALIGNMENT == 0
    assert block.untyped_storage().nbytes() == block.numel() * dtype.itemsize
    block.fill_(1.5)
    other = copy.deepcopy(block)
    block.zero_()
    assert bool((other == 1.5).all())


def test_a_large_product_is_saved_and_shared(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lora_A, lora_B = (torch.randn(s, generator=generator) for s in ((8, 1201), (1203, 8)))
    assert matrix.LARGE < 4 * 1201 * 1203
    product = low_rank_product(lora_A.requires_grad_(), lora_B, 0.5)
    assert not product.requires_grad
    torch.testing.assert_close(product, (0.5 * lora_B) @ lora_A.detach())
    torch.save(product, tmp_path / "product.pt")
    assert torch.equal(torch.load(tmp_path / "product.pt", weights_only=True), product)
    assert torch.equal(nn.Parameter(product).share_memory_(), product)
