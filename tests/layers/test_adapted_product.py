"""x W + s (x Aᵀ) Bᵀ + bias as one step of the graph, against autograd's own two products."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lora_init.layers.adapted_product import adapted_product

SCALING = 1.5


def operands(*leading, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    shapes = (*leading, 6), (6, 4), (2, 6), (4, 2), (4,)
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def in_two_steps(x, weight, lora_A, lora_B, bias=None):
    outputs = x @ weight + SCALING * (x @ lora_A.T) @ lora_B.T
    return outputs if bias is None else outputs + bias


def fused(x, weight, lora_A, lora_B, bias=None):
    return adapted_product(x, weight, lora_A, lora_B, bias, SCALING)


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_and_gradients(leading, with_bias):
    tensors = operands(*leading)[: 5 if with_bias else 4]
    expected, actual = in_two_steps(*tensors), fused(*tensors)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    pairs = (torch.autograd.grad(out, tensors, direction) for out in (expected, actual))
    for theirs, ours in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_first_and_second_derivatives_by_differences():
    tensors = operands(2, 3)
    assert gradcheck(fused, tensors)
    assert gradgradcheck(fused, tensors)


@pytest.mark.parametrize("trained", [(2,), (3,), (4,), (0, 3), (2, 3), (1, 2, 3)], ids=str)
def test_only_what_is_asked_for(trained):
    tensors = [t.detach().requires_grad_(n in trained) for n, t in enumerate(operands(3))]
    fused(*tensors).sum().backward()
    assert [n for n, t in enumerate(tensors) if t.grad is not None] == list(trained)


def test_inputs_in_any_layout_stay_as_they_are():
    x, *others = operands(3, 5)
    turned = x.detach().transpose(0, 1).requires_grad_()
    before = turned.detach().clone()
    result = fused(turned, *others)
    torch.testing.assert_close(result, in_two_steps(turned, *others))
    result.square().sum().backward()
    assert turned.grad.shape == turned.shape
    assert torch.equal(turned, before)


def test_a_second_backward_pass_gives_the_same():
    tensors = operands(3)
    result = fused(*tensors).square().sum()
    first, second = (torch.autograd.grad(result, tensors, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_outputs_may_be_written_to():
    """As by Falcon's residual sum or nn.ReLU(inplace=True); the gradients are the same."""
    tensors = operands(5)
    expected = torch.autograd.grad(in_two_steps(*tensors).relu().sum(), tensors)
    actual = torch.autograd.grad(torch.relu_(fused(*tensors)).sum(), tensors)
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours, theirs)
