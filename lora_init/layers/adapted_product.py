"""``x W + s (x Aᵀ) Bᵀ`` as one step of the graph.

Autograd would give each of the two products a block of memory for its outputs and, on the way back,
for the gradient of its inputs, and then add the blocks. Here the second product is added into the
first one's block, both ways: of a layer's blocks the one that is not there costs most, because on a
CPU fresh memory takes longer than the arithmetic that fills it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        hidden = (inputs @ lora_A.T) * scaling
        outputs = (inputs @ weight).addmm_(hidden, lora_B.T)
        ctx.save_for_backward(x, weight, lora_A, lora_B, hidden)
        ctx.scaling = scaling
        return outputs.view(*x.shape[:-1], outputs.shape[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, hidden = ctx.saved_tensors
        of_x, of_weight, of_A, of_B, _ = ctx.needs_input_grad
        inputs, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        if torch.is_grad_enabled():  # for a second derivative, which `hidden` knows no way back for
            hidden = (inputs @ lora_A.T) * ctx.scaling
        by_hidden = (gradient @ lora_B) * ctx.scaling
        return (
            (gradient @ weight.T).addmm_(by_hidden, lora_A).view(x.shape) if of_x else None,
            inputs.T @ gradient if of_weight else None,
            by_hidden.T @ inputs if of_A else None,
            gradient.T @ hidden if of_B else None,
            None,
        )


def adapted_product(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "in out"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    scaling: float,
) -> Float[Tensor, "*batch out"]:
    """x W + s (x Aᵀ) Bᵀ, all of one dtype; differentiable, twice too, in every tensor."""
    return _Sum.apply(x, weight, lora_A, lora_B, scaling)
