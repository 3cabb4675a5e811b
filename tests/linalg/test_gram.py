"""Symmetric products are the general ones, computed from their upper block triangle alone."""

import pytest
import torch

from lora_init.linalg.gram import accumulate_gram, mirror

DTYPES = {torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.mark.parametrize("columns", [1, 128, 257, 300, 577])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_symmetric_product_is_added_to_a_sum(columns, dtype):
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn(120, columns, generator=generator, dtype=dtype)[::2]
    before = torch.randn(columns, columns, generator=generator, dtype=dtype)
    before = before + before.T
    gram = before.clone()
    for some in (rows[:40], rows[40:], rows[:0]):
        accumulate_gram(gram, some)
    mirror(gram)
    expected = before.double() + rows.double().T @ rows.double()
    gap = (gram - expected).abs().max() / expected.diagonal().abs().max()
    assert gap <= DTYPES[dtype]
    assert torch.equal(gram, gram.T)
