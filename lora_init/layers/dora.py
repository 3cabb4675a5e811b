"""Weight-decomposed adaptation (DoRA): the row norms of an adapted weight.

    V = W + s B A,    h = m · (V x) / ‖V‖ + bias,    m0 = ‖V0‖,

with ‖·‖ over the input dimension. At step 0 the gain m / ‖V‖ is 1 up to rounding, so DoRA preserves
whatever the initializer preserves. For a subtracting method V0 = W_original. The norms are

    ‖V‖² = ‖W‖² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B (A Aᵀ), B⟩    (⟨·, ·⟩ row by row).

They cost out · in · rank operations and one read of W. ‖W‖² is a constant, and V is never formed.
If s B0 A0 is subtracted in the forward pass, V = W + s (B A - B0 A0). The terms of both products
are then paired so that they cancel exactly at step 0.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv 2402.09353,
equations 5 and 11.
Deviations: PEFT passes an in × in identity through both factors to form B A, and then forms V, in
every forward pass. The norms are float32 here whatever the base's dtype.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.layers import two_parts
from lora_init.layers.transforms import is_transformed
from lora_init.linalg.matrix import widened
from lora_init.linalg.precision import wide_device

Initial = tuple[Tensor, Tensor, Tensor]
"""A0, B0 and W A0ᵀ, if the forward pass subtracts the initial product."""


@torch.no_grad()
def square_norms(weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    """‖W‖² row by row, summed in float64."""
    place = wide_device(weight.device)
    norms = torch.linalg.vector_norm(weight.to(place), dim=1, dtype=torch.float64)
    return norms.square().to(widened(weight).dtype).to(weight.device)


@torch.no_grad()
def projection(
    weight: Float[Tensor, "out in"], lora_A: Float[Tensor, "rank in"]
) -> Float[Tensor, "out rank"]:
    """W Aᵀ in float32 or wider."""
    dtype = torch.promote_types(widened(weight).dtype, widened(lora_A).dtype)
    if two_parts.apply_to(weight, dtype) and not is_transformed():
        return two_parts.left_by_factor(weight, lora_A.to(dtype).T)  # no float32 copy of W
    return weight.to(dtype) @ lora_A.to(dtype).T


@torch.no_grad()
def adapted_norms(
    weight: Float[Tensor, "out in"],
    base_square_norms: Float[Tensor, " out"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    scaling: float,
    initial: Initial | None = None,
) -> Float[Tensor, " out"]:
    """‖W + s B A‖, or ‖W + s (B A - B0 A0)‖ with `initial`, row by row; without a gradient."""
    # Disable autocast: 16-bit products would add an error of 0.4 % to every gain.
    with torch.autocast(weight.device.type, enabled=False):
        lora_A, lora_B = widened(lora_A), widened(lora_B)
        projected = projection(weight, lora_A)
        if initial is None:
            # s ⟨2 W Aᵀ + s B (A Aᵀ), B⟩ as one product: for such thin matrices and hundreds of
            # layers, call overhead dominates the arithmetic.
            lora_B = lora_B.to(projected.dtype)
            gram = (lora_A @ lora_A.T).to(projected.dtype)
            both = torch.addmm(projected, lora_B, gram, beta=2 * scaling, alpha=scaling**2)
            squares = base_square_norms + _row_dot(both, lora_B)
        else:
            linear = _row_dot(projected, lora_B)
            square = _row_dot(lora_B @ (lora_A @ lora_A.T), lora_B)
            initial_A, initial_B, initial_projection = initial
            initial_A, initial_B = widened(initial_A), widened(initial_B)
            linear = linear - _row_dot(initial_projection, initial_B)
            crossed = _row_dot(lora_B @ (lora_A @ initial_A.T), initial_B)
            initial_square = _row_dot(initial_B @ (initial_A @ initial_A.T), initial_B)
            square = square - 2 * crossed + initial_square
            squares = base_square_norms + 2 * scaling * linear + scaling**2 * square
        return above_rounding(squares, base_square_norms).sqrt()


def above_rounding(
    squares: Float[Tensor, " out"], base_square_norms: Float[Tensor, " out"]
) -> Float[Tensor, " out"]:
    """Clamp ‖V‖² to the rounding error of its sum, which is that of ‖W‖².

    If a row of V cancels, only rounding errors remain, and the gain would be arbitrary. All ways to
    compute the norms clamp to the same value.
    """
    numbers = torch.finfo(squares.dtype)
    floor = (base_square_norms * (8 * numbers.eps)).add_(numbers.tiny)
    return torch.maximum(squares, floor)


class _Scaled(torch.autograd.Function):
    """``values * gain + bias``, with a backward pass that allocates one output instead of two.

    On a CPU, allocating a fresh output costs several times the multiplication.
    """

    @staticmethod
    def forward(ctx, values: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, gain)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        if bias is None:
            return values * gain
        dtype = torch.promote_types(values.dtype, gain.dtype)
        return torch.addcmul(bias.to(dtype), values, gain)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        values, gain = ctx.saved_tensors
        by_bias = None
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.bias
            by_bias = gradient.sum_to_size(shape).to(dtype)
        product = gradient * values
        by_gain = product.sum_to_size(gain.shape)
        if product.dtype == values.dtype and not torch.is_grad_enabled():
            return torch.mul(gradient, gain, out=product), by_gain, by_bias
        return (gradient * gain).to(values.dtype), by_gain, by_bias


def scaled(values: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """``values * gain + bias``; both vectors must broadcast over the values."""
    if is_transformed():
        return values * gain if bias is None else values * gain + bias
    return _Scaled.apply(values, gain, bias)


def _row_dot(left: Float[Tensor, "out rank"], right: Float[Tensor, "out rank"]) -> Tensor:
    return (left * right).sum(1)
