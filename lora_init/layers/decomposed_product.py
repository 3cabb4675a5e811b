"""``m · V x / ‖V‖ + bias`` with V = W + s B A, as a single autograd function (DoRA).

The norms need W Aᵀ and A Aᵀ. Appending A to the inputs makes them rows of products that the forward
pass computes anyway: ``[x; A] W`` and ``[x; A] Aᵀ``. The weight is then read only once. With the
lower rows of s [x; A] Aᵀ halved, the lower rows of the outputs are P = A W + s/2 (A Aᵀ) Bᵀ, and

    ‖V‖² = ‖W‖² + 2 s ⟨Pᵀ, B⟩    (row by row; see `lora_init.layers.dora`).

The gradient treats the norms as constants (Liu et al. 2024, section 4.3).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.layers.adapted_product import gradients, unflattened
from lora_init.layers.dora import above_rounding
from lora_init.linalg.precision import without_autocast


class _Decomposed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        base_square_norms: Tensor,
        scaling: float,
    ) -> Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        positions = len(inputs)
        stacked = torch.cat([inputs, lora_A])
        hidden = (stacked @ lora_A.T).mul_(scaling)
        hidden[positions:] /= 2
        values = (stacked @ weight).addmm_(hidden, lora_B.T)
        growth = (values[positions:] * lora_B.T).sum(0)
        squares = torch.add(base_square_norms, growth, alpha=2 * scaling)
        inverse_norms = above_rounding(squares, base_square_norms).rsqrt_()
        gain = magnitude * inverse_norms
        hidden, values = hidden[:positions], values[:positions]
        outputs = values * gain if bias is None else torch.addcmul(bias, values, gain)
        ctx.save_for_backward(
            x, weight, lora_A, lora_B, magnitude, inverse_norms, hidden, values, gain
        )
        ctx.scaling = scaling
        return unflattened(outputs, x)

    @staticmethod
    @without_autocast()  # also if the backward pass is called under autocast
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, magnitude, inverse_norms, hidden, values, gain = (
            ctx.saved_tensors
        )
        of_magnitude, of_bias = ctx.needs_input_grad[4:6]
        inputs, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        twice = torch.is_grad_enabled()
        if twice:  # second derivatives: the saved tensors have no graph
            hidden = (inputs @ lora_A.T) * ctx.scaling
            values = inputs @ weight + hidden @ lora_B.T
            gain = magnitude * inverse_norms
        by_bias = gradient.sum(0) if of_bias else None
        by_values = gradient * values
        by_magnitude = by_values.sum(0) * inverse_norms if of_magnitude else None
        # Reuse the memory: a fresh allocation would cost more than the multiplication.
        by_values = torch.mul(gradient, gain, out=None if twice else by_values)
        products = gradients(
            by_values, x, weight, lora_A, lora_B, hidden, ctx.scaling, ctx.needs_input_grad
        )
        return (*products, by_magnitude, by_bias, None, None)


def decomposed_product(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "in out"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    magnitude: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None,
    base_square_norms: Float[Tensor, " out"],
    scaling: float,
) -> Float[Tensor, "*batch out"]:
    """m · (x W + s (x Aᵀ) Bᵀ) / ‖V‖ + bias, all of one dtype, float32 or float64.

    Twice differentiable in every tensor except the squared norms ‖W‖².
    """
    return _Decomposed.apply(x, weight, lora_A, lora_B, magnitude, bias, base_square_norms, scaling)
