"""``x W + bias + s (x Aᵀ) Bᵀ - s (x A0ᵀ) B0ᵀ`` for a 16-bit base with float32 factors.

Plain autograd would save a float32 copy of x and allocate float32 outputs. This function adds the
adapter's part to the base's output in place and rounds once. Its backward pass needs only x and the
hidden values between A and B.

Both low-rank products are computed as one, from differences of the factors:

    B A - B0 A0 = (B - B0) A + B0 (A - A0).

At step 0 this is exactly zero, whatever the summation order of a device.

| base | products with the factors |
|---|---|
| bfloat16 on a GPU | in bfloat16 parts, summed in float32 (see `lora_init.layers.two_parts`) |
| any other | in the widest dtype of x and the factors, at least float32 |
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.layers import two_parts, wide_products
from lora_init.layers.adapted_product import converts, unflattened
from lora_init.linalg.precision import without_autocast

Initial = tuple[Tensor, Tensor]
"""The pair A0, B0."""


def wide_dtype(x: Tensor, lora_A: Tensor) -> torch.dtype:
    """The dtype of the products with the factors."""
    if lora_A.dtype is torch.float32 and x.dtype is not torch.float64:
        return torch.float32
    return torch.promote_types(torch.promote_types(x.dtype, lora_A.dtype), torch.float32)


class _LowRankSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        initial_A: Tensor | None,
        initial_B: Tensor | None,
        scaling: float,
    ) -> Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        block = inputs @ weight if bias is None else torch.addmm(bias, inputs, weight)
        dtype = wide_dtype(x, lora_A)
        A, B = differences(lora_A, lora_B, initial_A, initial_B, dtype)
        products = two_parts if two_parts.apply_to(x, dtype) else wide_products
        hidden = products.left_by_factor(inputs, A.T)
        products.add_product(block, hidden, B.T, scaling)
        hidden = hidden[:, : len(lora_A)]  # x Aᵀ
        ctx.save_for_backward(x, weight, lora_A, lora_B, initial_A, initial_B, hidden)
        ctx.scaling = scaling
        return unflattened(block, x)

    @staticmethod
    @without_autocast()  # also if the backward pass is called under autocast
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, initial_A, initial_B, hidden = ctx.saved_tensors
        of_x, of_weight, of_A, of_B, of_bias = ctx.needs_input_grad[:5]
        inputs, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        dtype = wide_dtype(x, lora_A)
        A, B = differences(lora_A, lora_B, initial_A, initial_B, dtype)
        products, rows, wide = two_parts, inputs, gradient
        if torch.is_grad_enabled() or not two_parts.apply_to(x, dtype):
            products, wide = wide_products, gradient.to(dtype)
            rows = inputs.to(dtype) if of_A else inputs
        if torch.is_grad_enabled():  # a second derivative: the saved `hidden` has no graph
            hidden = products.left_by_factor(inputs, lora_A.to(dtype).T)
        by_x = by_A = by_B = None
        by_hidden: Any = None
        if of_x or of_A:
            by_hidden = products.left_by_factor(wide, B)
        if of_x:
            if converts(gradient):
                by_x = gradient.to(dtype) @ weight.T.to(dtype)
            else:
                by_x = gradient @ weight.T
            by_x = products.add_product(by_x, by_hidden, A, ctx.scaling).to(x.dtype).view(x.shape)
        if of_A:
            by_A = products.factor_by_right(folded(by_hidden, len(lora_A)), rows)
            by_A = (by_A * ctx.scaling).to(lora_A.dtype)
        if of_B:
            by_B = products.factor_by_right(hidden, wide)
            by_B = (by_B * ctx.scaling).T.to(lora_B.dtype)
        by_weight = inputs.T @ gradient if of_weight else None
        by_bias = gradient.sum(0) if of_bias else None
        return by_x, by_weight, by_A, by_B, by_bias, None, None, None


def differences(
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    initial_A: Float[Tensor, "rank in"] | None,
    initial_B: Float[Tensor, "out rank"] | None,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "ranks in"], Float[Tensor, "out ranks"]]:
    """[A; A - A0] and [B - B0, B0], with the product B A - B0 A0. Without A0, B0: A and B."""
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    if initial_A is None or initial_B is None:
        return lora_A, lora_B
    initial_A, initial_B = initial_A.to(dtype), initial_B.to(dtype)
    return torch.cat([lora_A, lora_A - initial_A]), torch.cat([lora_B - initial_B, initial_B], 1)


def folded(by_hidden: Float[Tensor, "positions ranks"], rank: int) -> Tensor:
    """Compute gradient B from gradient [B - B0, B0]."""
    if by_hidden.shape[1] == rank:
        return by_hidden
    return by_hidden[:, :rank] + by_hidden[:, rank:]


def low_rank_sum(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "in out"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None,
    initial: Initial | None,
    scaling: float,
) -> Float[Tensor, "*batch out"]:
    """x W + bias + s (x Aᵀ) Bᵀ - s (x A0ᵀ) B0ᵀ in x's dtype; no last term without `initial`.

    x, W and bias have one dtype. Twice differentiable in every tensor except A0 and B0.
    """
    return _LowRankSum.apply(x, weight, lora_A, lora_B, bias, *(initial or (None, None)), scaling)
