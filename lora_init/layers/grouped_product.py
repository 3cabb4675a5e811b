"""Products of groups of rows, each with its own matrix of a stack.

The rows of a group are adjacent. Group e ends before row ``offsets[e]``, and the last group ends
with the last row. A GPU's kernel computes all groups in one launch. Elsewhere one product computes
one group, or two small ones.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn import functional

from lora_init.layers.grouped_batches import batches, multiply

ALIGNMENT = 16
"""Bytes. The kernel needs rows that begin at multiples of it."""


def grouped_product(
    rows: Float[Tensor, "positions inner"],
    stack: Float[Tensor, "groups inner out"],
    offsets: Int32[Tensor, " groups"],
) -> Float[Tensor, "positions out"]:
    """rows[i] @ stack[e] for each row i of group e.

    Both operands have one dtype. Differentiable in both. A gradient is computed only if it is
    needed, so a frozen stack costs no memory.
    """
    if has_kernel(rows, stack):
        return functional.grouped_mm(rows, stack, offs=offsets)
    return torch.ops.lora_init.grouped_product(rows, stack, offsets)


def grouped_outer(
    rows: Float[Tensor, "positions inner"],
    others: Float[Tensor, "positions out"],
    offsets: Int32[Tensor, " groups"],
) -> Float[Tensor, "groups inner out"]:
    """The transposed rows of each group times the other rows of the group. Differentiable."""
    return torch.ops.lora_init.grouped_outer(rows, others, offsets)


def has_kernel(rows: Tensor, stack: Tensor) -> bool:
    """Whether torch has a kernel that needs no group sizes on the host."""
    if not (rows.is_cuda and rows.dtype is stack.dtype is torch.bfloat16):
        return False
    widths = rows.shape[-1], stack.shape[-1]
    if any(width * rows.itemsize % ALIGNMENT for width in widths):
        return False
    capability = torch.cuda.get_device_capability(rows.device)
    return hasattr(functional, "grouped_mm") and capability >= (8, 0)


def sizes(offsets: Int32[Tensor, " groups"]) -> list[int]:
    """How many rows each group has."""
    stops = offsets.tolist()
    return [stop - start for start, stop in zip([0, *stops], stops, strict=False)]


@torch.library.custom_op(
    "lora_init::grouped_product",
    mutates_args=(),
    schema="(Tensor rows, Tensor stack, Tensor offsets) -> Tensor",
)
def _product(rows: Tensor, stack: Tensor, offsets: Tensor) -> Tensor:
    output = rows.new_empty(len(rows), stack.shape[2])
    for batch in batches(sizes(offsets), rows.dtype):
        into = batch.output(output)
        batch.store(multiply(batch.view(rows), batch.members(stack), into), output)
    return output


@torch.library.custom_op(
    "lora_init::grouped_outer",
    mutates_args=(),
    schema="(Tensor rows, Tensor others, Tensor offsets) -> Tensor",
)
def _outer(rows: Tensor, others: Tensor, offsets: Tensor) -> Tensor:
    output = rows.new_empty(len(offsets), rows.shape[1], others.shape[1])
    counts = sizes(offsets)
    parts = zip(rows.split(counts), others.split(counts), output.unbind(), strict=True)
    for part, other, into in parts:
        torch.mm(part.T, other, out=into)  # zero for an empty group
    return output


@_product.register_fake
def _(rows: Tensor, stack: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], stack.shape[2])


@_outer.register_fake
def _(rows: Tensor, others: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(offsets.shape[0], rows.shape[1], others.shape[1])


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    rows, stack, offsets = inputs
    of_rows, of_stack = ctx.needs_input_grad[:2]
    ctx.save_for_backward(rows if of_stack else None, stack if of_rows else None, offsets)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, stack, offsets = ctx.saved_tensors
    by_rows = by_stack = None
    if stack is not None:
        by_rows = torch.ops.lora_init.grouped_product(gradient, stack.transpose(1, 2), offsets)
    if rows is not None:
        by_stack = grouped_outer(rows, gradient, offsets)
    return by_rows, by_stack, None


def _outer_gradients(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, others, offsets = ctx.saved_tensors
    by_rows = grouped_product(others, gradient.transpose(1, 2), offsets)
    return by_rows, grouped_product(rows, gradient, offsets), None


_product.register_autograd(_gradients, setup_context=_keep)
_outer.register_autograd(
    _outer_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
