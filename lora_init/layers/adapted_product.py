"""``x W + s (x Aᵀ) Bᵀ + bias`` as a single autograd function.

Plain autograd allocates an output for each of the two products, and in the backward pass a gradient
of x for each. It then adds them. This function accumulates the second product into the first one's
memory in both passes. On a CPU, allocating fresh memory takes longer than the arithmetic.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg.precision import without_autocast

HALF_PRODUCTS_ARE_SLOW = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether 16-bit products on this CPU are slower than a float32 copy and a float32 product."""


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
    ) -> Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        hidden = (inputs @ lora_A.T).mul_(scaling)
        base = inputs @ weight if bias is None else torch.addmm(bias, inputs, weight)
        outputs = base.addmm_(hidden, lora_B.T)
        ctx.save_for_backward(x, weight, lora_A, lora_B, hidden)
        ctx.scaling = scaling
        return unflattened(outputs, x)

    @staticmethod
    @without_autocast()  # also if the backward pass is called under autocast
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, hidden = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        if torch.is_grad_enabled():  # second derivatives: the saved `hidden` has no graph
            hidden = (x.reshape(-1, x.shape[-1]) @ lora_A.T) * ctx.scaling
        needed = ctx.needs_input_grad
        by_bias = gradient.sum(0) if needed[4] else None
        products = gradients(gradient, x, weight, lora_A, lora_B, hidden, ctx.scaling, needed)
        return (*products, by_bias, None)


def gradients(
    gradient: Float[Tensor, "positions out"],
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "in out"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    hidden: Float[Tensor, "positions rank"],
    scaling: float,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W, A and B, if `needed`; `hidden` is s x Aᵀ."""
    inputs = x.reshape(-1, x.shape[-1])
    of_x, of_weight, of_A, of_B = needed[:4]
    by_x = by_A = None
    if of_x or of_A:
        by_hidden = (gradient @ lora_B) * scaling
        by_x = _by_x(gradient, weight, by_hidden, lora_A).view(x.shape) if of_x else None
        by_A = by_hidden.T @ inputs if of_A else None
    return (
        by_x,
        inputs.T @ gradient if of_weight else None,
        by_A,
        # Not gradientᵀ hidden: a product that reads the large matrix row by row is faster.
        (hidden.T @ gradient).T.contiguous() if of_B else None,
    )


def _by_x(gradient: Tensor, weight: Tensor, by_hidden: Tensor, lora_A: Tensor) -> Tensor:
    if converts(gradient):
        by_weight = gradient.float() @ weight.T.float()
        return by_weight.addmm_(by_hidden.float(), lora_A.float()).to(gradient.dtype)
    return (gradient @ weight.T).addmm_(by_hidden, lora_A)


def converts(gradient: Tensor) -> bool:
    """Whether the product of a gradient and the weight is computed from float32 copies."""
    return HALF_PRODUCTS_ARE_SLOW and gradient.dtype.itemsize < 4 and gradient.device.type == "cpu"


def unflattened(outputs: Float[Tensor, "positions out"], x: Tensor) -> Float[Tensor, "*batch out"]:
    """Reshape outputs like x, without an autograd view, which would forbid in-place writes."""
    return torch.ops.aten._unsafe_view(outputs, (*x.shape[:-1], outputs.shape[1]))


def adapted_product(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "in out"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None,
    scaling: float,
) -> Float[Tensor, "*batch out"]:
    """x W + s (x Aᵀ) Bᵀ + bias, all of one dtype; twice differentiable in every tensor."""
    return _Sum.apply(x, weight, lora_A, lora_B, bias, scaling)
