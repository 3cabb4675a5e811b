"""The symmetric product: the general one's result, from its upper block triangle alone."""

import pytest
import torch

from lora_init.linalg.gram import SMALLEST_BLOCK, accumulate_gram, mirror

DTYPES = {torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 300, 384, 577])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_general_product_added_to_what_was_there(columns, dtype):
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn(60, columns, generator=generator, dtype=dtype)
    before = torch.randn(columns, columns, generator=generator, dtype=dtype)
    before = before + before.T
    gram = before.clone()
    accumulate_gram(gram, rows[:40])
    accumulate_gram(gram, rows[40:])
    mirror(gram)
    expected = before.double() + rows.double().T @ rows.double()
    gap = (gram - expected).abs().max() / expected.diagonal().abs().max()
    assert gap <= DTYPES[dtype]
    assert torch.equal(gram, gram.T)


def test_what_lies_below_the_blocks_is_not_computed():
    block = SMALLEST_BLOCK["cpu"]
    gram = torch.zeros(2 * block, 2 * block)
    accumulate_gram(gram, torch.ones(3, len(gram)))
    assert not gram[block:, :block].any()
    assert (gram.triu() == 3 * torch.ones_like(gram).triu()).all()


@pytest.mark.parametrize("rows", [torch.ones(0, 200), torch.ones(200, 7).T, torch.ones(4, 400)])
def test_rows_of_any_number_and_strides(rows):
    rows = rows[:, ::2] if rows.shape[1] == 400 else rows
    gram = torch.zeros(rows.shape[1], rows.shape[1])
    accumulate_gram(gram, rows)
    mirror(gram)
    assert torch.equal(gram, torch.full_like(gram, len(rows)))
