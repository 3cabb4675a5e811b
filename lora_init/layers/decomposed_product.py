"""``m · V x / ‖V‖ + bias`` with V = W + s B A, as one step of the graph (DoRA).

The norms need W Aᵀ and A Aᵀ. Both are rows of products that the forward pass makes anyway, once A
stands below the inputs: ``[x; A] W`` and ``[x; A] Aᵀ``. So the weight is read once, and no thin
matrices are multiplied by themselves (512 positions, 576 to 1536, rank 8: 8.9 ms, where norms by
themselves made it 10.5 and LoRA takes 7.6). With the lower rows of s [x; A] Aᵀ halved, what lies
below the outputs is P = A W + s/2 (A Aᵀ) Bᵀ, and

    ‖V‖² = ‖W‖² + 2 s ⟨Pᵀ, B⟩    (row by row; see `lora_init.layers.dora`).

The norms are constants for the gradient (Liu et al. 2024, section 4.3).
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
    @without_autocast()  # whatever autocast the backward pass is called under
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, magnitude, inverse_norms, hidden, values, gain = (
            ctx.saved_tensors
        )
        of_magnitude, of_bias = ctx.needs_input_grad[4:6]
        inputs, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        twice = torch.is_grad_enabled()
        if twice:  # a second derivative: what was kept knows no way back to the factors
            hidden = (inputs @ lora_A.T) * ctx.scaling
            values = inputs @ weight + hidden @ lora_B.T
            gain = magnitude * inverse_norms
        by_bias = gradient.sum(0) if of_bias else None
        by_values = gradient * values
        by_magnitude = by_values.sum(0) * inverse_norms if of_magnitude else None
        # In the same block: fresh memory would cost more than the multiplication.
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

    Differentiable, twice too, in every tensor but the squared norms ‖W‖².
    """
    return _Decomposed.apply(x, weight, lora_A, lora_B, magnitude, bias, base_square_norms, scaling)
