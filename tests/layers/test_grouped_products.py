"""Products of groups of rows: values, gradients and second derivatives."""

from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lora_init.layers.grouped_product import grouped_outer, grouped_product
from lora_init.layers.grouped_sum import grouped_sum

pytestmark = pytest.mark.sampled(3)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request, monkeypatch):
    """With two threads, groups are multiplied two by two."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


OFFSETS = torch.tensor([2, 2, 6, 7], dtype=torch.int32)  # the second group is empty
ROWS, GROUPS, INNER, OUT, RANK, SCALING = 7, 4, 5, 3, 2, 1.5


def draws(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def operands():
    """x, W, A, B."""
    shapes = (ROWS, INNER), (GROUPS, INNER, OUT), (GROUPS, INNER, RANK), (GROUPS, RANK, OUT)
    return [draws(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def added(x, W, A, B):
    return grouped_sum(x, W, A, B, OFFSETS, SCALING)


def multiplied(x, W):
    return grouped_product(x, W, OFFSETS)


def outer(x, y):
    return grouped_outer(x, y, OFFSETS)


def test_each_group_has_its_own_matrix():
    x, W, A, B = operands()
    product, total = multiplied(x, W), added(x, W, A, B)
    bounds = [0, *OFFSETS.tolist()]
    for group, (start, stop) in enumerate(pairwise(bounds)):
        matrix = W[group] + SCALING * A[group] @ B[group]
        torch.testing.assert_close(product[start:stop], x[start:stop] @ W[group])
        torch.testing.assert_close(total[start:stop], x[start:stop] @ matrix)


@pytest.mark.parametrize(
    "sizes",
    [[3], [2, 2], [0, 5, 0], [9, 1, 4, 4, 2], [200, 3, 1, 150], [1, 0, 7]],
    ids=str,
)
def test_groups_of_every_size(sizes):
    offsets = torch.tensor(sizes).cumsum(0).int()
    x, W = draws(sum(sizes), INNER), draws(len(sizes), INNER, OUT, seed=1)
    A, B = draws(len(sizes), INNER, RANK, seed=2), draws(len(sizes), RANK, OUT, seed=3)
    wanted = torch.cat(
        [
            rows @ (W[group] + SCALING * A[group] @ B[group])
            for group, rows in enumerate(x.split(sizes))
        ]
    )
    torch.testing.assert_close(grouped_sum(x, W, A, B, offsets, SCALING), wanted)
    wanted = torch.cat([rows @ W[group] for group, rows in enumerate(x.split(sizes))])
    torch.testing.assert_close(grouped_product(x, W, offsets), wanted)


@pytest.mark.parametrize("function", [added, multiplied, outer])
def test_first_and_second_derivatives(function):
    inputs = {
        added: operands(),
        multiplied: operands()[:2],
        outer: [draws(ROWS, INNER), draws(ROWS, OUT, seed=1)],
    }[function]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_operand_gets_no_gradient(frozen):
    inputs = operands()
    inputs[frozen].requires_grad_(False)
    added(*inputs).sum().backward()
    assert [one.grad is None for one in inputs] == [i == frozen for i in range(4)]
