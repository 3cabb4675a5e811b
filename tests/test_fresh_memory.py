"""Blocks for large matrices are tensors like any other."""

import copy

import pytest
import torch

from lora_init.factors import low_rank_product
from lora_init.linalg import matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (1500, 1501)], ids=str)
def test_a_block_is_a_tensor_of_its_own(shape, dtype):
    block = matrix.empty(shape, dtype, torch.device("cpu"))
    assert block.shape == shape
    assert block.dtype == dtype
    assert block.is_contiguous()
    assert block.data_ptr() % matrix.ALIGNMENT == 0
    storage = block.untyped_storage()
    assert storage.nbytes() == block.numel() * dtype.itemsize
    assert block.storage_offset() == 0
    block.fill_(1.5)
    other = copy.deepcopy(block)
    block.zero_()
    assert bool((other == 1.5).all())


def test_a_large_product_is_the_product(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lora_A, lora_B = (torch.randn(s, generator=generator) for s in ((8, 1201), (1203, 8)))
    assert matrix.LARGE < 4 * 1201 * 1203
    product = low_rank_product(lora_A.requires_grad_(), lora_B, 0.5)
    assert not product.requires_grad
    torch.testing.assert_close(product, (0.5 * lora_B) @ lora_A.detach())
    torch.save(product, tmp_path / "product.pt")
    assert torch.equal(torch.load(tmp_path / "product.pt", weights_only=True), product)
    shared = torch.nn.Parameter(product).share_memory_()
    assert torch.equal(shared, product)
