"""m · V x / ‖V‖ + bias as one step of the graph, against V formed and autograd's own steps."""

import pytest
import torch

from lora_init.layers.decomposed_product import decomposed_product

SCALING = 1.5
ROWS, COLUMNS, RANK = 4, 6, 2


def operands(*leading, dtype=torch.float64):
    """x, W, A, B, m, bias."""
    generator = torch.Generator().manual_seed(5)
    shapes = (*leading, COLUMNS), (COLUMNS, ROWS), (RANK, COLUMNS), (ROWS, RANK), (ROWS,), (ROWS,)
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def by_definition(x, weight, lora_A, lora_B, magnitude, bias=None):
    adapted = weight.T + SCALING * lora_B @ lora_A
    outputs = magnitude * (x @ adapted.T) / adapted.norm(dim=1).detach()
    return outputs if bias is None else outputs + bias


def fused(x, weight, lora_A, lora_B, magnitude, bias=None):
    squares = weight.detach().square().sum(0)
    return decomposed_product(x, weight, lora_A, lora_B, magnitude, bias, squares, SCALING)


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_and_gradients(leading, with_bias):
    tensors = operands(*leading)[: 6 if with_bias else 5]
    expected, actual = by_definition(*tensors), fused(*tensors)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    pairs = (torch.autograd.grad(out, tensors, direction) for out in (expected, actual))
    for theirs, ours in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives():
    tensors = operands(2, 3)
    found = []
    for function in (by_definition, fused):
        outputs = function(*tensors)
        first = torch.autograd.grad(outputs.pow(3).sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("trained", [(2,), (3,), (4,), (5,), (0, 3), (1, 2, 4)], ids=str)
def test_only_what_is_asked_for(trained):
    tensors = [t.detach().requires_grad_(n in trained) for n, t in enumerate(operands(3))]
    fused(*tensors).sum().backward()
    assert [n for n, t in enumerate(tensors) if t.grad is not None] == list(trained)


def test_a_second_backward_pass_gives_the_same():
    tensors = operands(3)
    result = fused(*tensors).square().sum()
    first, second = (torch.autograd.grad(result, tensors, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_outputs_may_be_written_to():
    """As by Falcon's residual sum or nn.ReLU(inplace=True); the gradients are the same."""
    tensors = operands(5)
    expected = torch.autograd.grad(by_definition(*tensors).relu().sum(), tensors)
    actual = torch.autograd.grad(torch.relu_(fused(*tensors)).sum(), tensors)
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_row_that_cancels_stays_finite():
    """‖V‖² is a sum of terms that cancel; rounding may leave it below zero."""
    x, weight, lora_A, lora_B, magnitude, _ = (t.detach() for t in operands(3, dtype=torch.float32))
    weight[:, 0] = -SCALING * (lora_B[0] @ lora_A)
    outputs = fused(x, weight, lora_A, lora_B, torch.ones_like(magnitude))
    assert outputs[:, 0].abs().max() < 1e-2 < outputs[:, 1:].abs().max()
