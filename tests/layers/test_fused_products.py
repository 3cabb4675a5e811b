"""The products of plain and of DoRA layers as one step of the graph, against autograd's own."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lora_init.layers.adapted_product import adapted_product
from lora_init.layers.decomposed_product import decomposed_product

SCALING = 1.5
ROWS, COLUMNS, RANK = 4, 6, 2


def operands(function, *leading, dtype=torch.float64):
    """x, W, A, B, m for the decomposed product, bias."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(*leading, COLUMNS), (COLUMNS, ROWS), (RANK, COLUMNS), (ROWS, RANK), (ROWS,)]
    shapes += [(ROWS,)] if function is decomposed else []
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def in_two_steps(x, weight, lora_A, lora_B, bias=None):
    outputs = x @ weight + SCALING * (x @ lora_A.T) @ lora_B.T
    return outputs if bias is None else outputs + bias


def adapted(x, weight, lora_A, lora_B, bias=None):
    return adapted_product(x, weight, lora_A, lora_B, bias, SCALING)


def by_definition(x, weight, lora_A, lora_B, magnitude, bias=None):
    whole = weight.T + SCALING * lora_B @ lora_A
    outputs = magnitude * (x @ whole.T) / whole.norm(dim=1).detach()
    return outputs if bias is None else outputs + bias


def decomposed(x, weight, lora_A, lora_B, magnitude, bias=None):
    squares = weight.detach().square().sum(0)
    return decomposed_product(x, weight, lora_A, lora_B, magnitude, bias, squares, SCALING)


REFERENCES = {adapted: in_two_steps, decomposed: by_definition}
every_product = pytest.mark.parametrize("fused", REFERENCES)


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@every_product
def test_output_and_gradients(fused, leading, with_bias):
    tensors = operands(fused, *leading)
    tensors = tensors if with_bias else tensors[:-1]
    expected, actual = REFERENCES[fused](*tensors), fused(*tensors)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    pairs = (torch.autograd.grad(out, tensors, direction) for out in (expected, actual))
    for theirs, ours in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_product
def test_second_derivatives(fused):
    tensors = operands(fused, 2, 3)
    found = []
    for function in (REFERENCES[fused], fused):
        outputs = function(*tensors)
        first = torch.autograd.grad(outputs.pow(3).sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_first_and_second_derivatives_by_differences():
    tensors = operands(adapted, 2, 3)
    assert gradcheck(adapted, tensors)
    assert gradgradcheck(adapted, tensors)


@pytest.mark.parametrize(
    ("fused", "trained"),
    [(adapted, trained) for trained in [(2,), (3,), (4,), (0, 3), (2, 3), (1, 2, 3)]]
    + [(decomposed, trained) for trained in [(2,), (3,), (4,), (5,), (0, 3), (1, 2, 4)]],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_only_what_is_asked_for(fused, trained):
    tensors = [t.detach().requires_grad_(n in trained) for n, t in enumerate(operands(fused, 3))]
    fused(*tensors).sum().backward()
    assert [n for n, t in enumerate(tensors) if t.grad is not None] == list(trained)


def test_inputs_in_any_layout_stay_as_they_are():
    x, *others = operands(adapted, 3, 5)
    turned = x.detach().transpose(0, 1).requires_grad_()
    before = turned.detach().clone()
    result = adapted(turned, *others)
    torch.testing.assert_close(result, in_two_steps(turned, *others))
    result.square().sum().backward()
    assert turned.grad.shape == turned.shape
    assert torch.equal(turned, before)


@every_product
def test_a_second_backward_pass_gives_the_same(fused):
    tensors = operands(fused, 3)
    result = fused(*tensors).square().sum()
    first, second = (torch.autograd.grad(result, tensors, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@every_product
def test_outputs_may_be_written_to(fused):
    """As by Falcon's residual sum or nn.ReLU(inplace=True); the gradients are the same."""
    tensors = operands(fused, 5)
    expected = torch.autograd.grad(REFERENCES[fused](*tensors).relu().sum(), tensors)
    actual = torch.autograd.grad(torch.relu_(fused(*tensors)).sum(), tensors)
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_row_that_cancels_stays_finite():
    """‖V‖² is a sum of terms that cancel; rounding may leave it below zero."""
    tensors = operands(decomposed, 3, dtype=torch.float32)
    x, weight, lora_A, lora_B, magnitude, _ = (t.detach() for t in tensors)
    weight[:, 0] = -SCALING * (lora_B[0] @ lora_A)
    outputs = decomposed(x, weight, lora_A, lora_B, torch.ones_like(magnitude))
    assert outputs[:, 0].abs().max() < 1e-2 < outputs[:, 1:].abs().max()
