"""``x W_e + s (x A_e) B_e`` for groups of rows, as one operation.

Composed of grouped products, the update would write outputs of its own and read them again to add
them, and likewise for the gradient of x. Here each group's update is accumulated into the base
product while that is still in the cache.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from lora_init.layers.grouped_batches import batches, multiply
from lora_init.layers.grouped_product import grouped_outer, grouped_product, has_kernel, sizes


def grouped_sum(
    rows: Float[Tensor, "positions inner"],
    stack: Float[Tensor, "groups inner out"],
    lora_A: Float[Tensor, "groups inner rank"],
    lora_B: Float[Tensor, "groups rank out"],
    offsets: Int32[Tensor, " groups"],
    scaling: float,
) -> Float[Tensor, "positions out"]:
    """x W_e + s (x A_e) B_e for each row x of group e. All operands have one dtype.

    Twice differentiable in all of them. Gradients are computed only if they are needed.
    """
    if has_kernel(rows, stack):
        base = grouped_product(rows, stack, offsets)
        hidden = grouped_product(rows, lora_A, offsets) * scaling
        return base + grouped_product(hidden, lora_B, offsets)
    operands = rows, stack, lora_A, lora_B, offsets, scaling
    return torch.ops.lora_init.grouped_sum(*operands)[0]


@torch.library.custom_op(
    "lora_init::grouped_sum",
    mutates_args=(),
    schema="(Tensor rows, Tensor stack, Tensor lora_A, Tensor lora_B, Tensor offsets, "
    "float scaling) -> (Tensor, Tensor)",
)
def _sum(
    rows: Tensor, stack: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The sum, and s x A_e, which the backward pass reads."""
    output = rows.new_empty(len(rows), stack.shape[2])
    hidden = rows.new_empty(len(rows), lora_A.shape[2])
    for batch in batches(sizes(offsets), rows.dtype):
        x, A, B = batch.view(rows), batch.members(lora_A), batch.members(lora_B)
        inner = multiply(x, A, batch.output(hidden))
        total = multiply(x, batch.members(stack), batch.output(output))
        if len(total) == 1:
            total[0].addmm_(inner[0], B[0], alpha=scaling)
        else:
            total.baddbmm_(inner, B, alpha=scaling)
        batch.store(inner, hidden)
        batch.store(total, output)
    return output, hidden.mul_(scaling)


@_sum.register_fake
def _(
    rows: Tensor, stack: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    count = rows.shape[0]
    return rows.new_empty(count, stack.shape[2]), rows.new_empty(count, lora_A.shape[2])


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    rows, stack, lora_A, lora_B, offsets, ctx.scaling = inputs
    ctx.save_for_backward(rows, stack, lora_A, lora_B, offsets, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, gradient: Tensor | None, of_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
    """`of_hidden`, a gradient of s x A_e, exists for second derivatives only."""
    rows, stack, lora_A, lora_B, offsets, hidden = ctx.saved_tensors
    upstream: Tensor
    upstream = rows.new_zeros(len(rows), stack.shape[2]) if gradient is None else gradient
    # The gradient of x is the same sum with transposed matrices, and its inner product is s times
    # the gradient of s x A_e.
    transposed = (matrices.transpose(1, 2) for matrices in (stack, lora_B, lora_A))
    by_rows, inner = torch.ops.lora_init.grouped_sum(upstream, *transposed, offsets, ctx.scaling)
    if of_hidden is not None:
        extra: Tensor = of_hidden * ctx.scaling
        by_rows = by_rows + grouped_product(extra, lora_A.transpose(1, 2), offsets)
        inner = inner + extra
    of_stack, of_A, of_B = ctx.needs_input_grad[1:4]
    return (
        by_rows,
        grouped_outer(rows, upstream, offsets) if of_stack else None,
        # Not xᵀ inner: a product that reads the large matrix row by row is faster.
        grouped_outer(inner, rows, offsets).transpose(1, 2) if of_A else None,
        grouped_outer(hidden, upstream, offsets) if of_B else None,
        None,
        None,
    )


_sum.register_autograd(_gradients, setup_context=_keep)
