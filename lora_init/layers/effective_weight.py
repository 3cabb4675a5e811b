"""The effective weight of an adapted layer, for models that read `layer.weight`.

Some models pass the weight to a function instead of calling the layer: attention kernels,
state-space models, fused losses, and convolutions with a linear layer's weight.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg.matrix import widened
from lora_init.linalg.precision import full_precision


def effective_weight(
    stored: Tensor,
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    scaling: float,
    *,
    transposed: bool,
    dtype: torch.dtype,
    initial: tuple[Tensor, Tensor] | None = None,
    gain: Float[Tensor, " out"] | None = None,
) -> Tensor:
    """g (W + s B A - s B0 A0) in the module's layout, differentiable in g, W, A and B.

    Args:
        stored: W as the module stores it; dequantized for packed modules.
        transposed: whether it is stored as (in, out).
        initial: A0 and B0, if the forward pass subtracts their product.
        gain: DoRA's g.
        dtype: the dtype of the result. The sum is computed in float32 or wider and rounded once.
    """
    with full_precision():
        weight = widened(stored).flatten(1)
        lora_A, lora_B = widened(lora_A), widened(lora_B)
        wide = torch.promote_types(weight.dtype, torch.promote_types(lora_A.dtype, lora_B.dtype))
        weight = weight.to(wide)
        left, right = _oriented(lora_A.to(wide), lora_B.to(wide) * scaling, transposed)
        if initial is None:
            total = torch.addmm(weight, left, right)
        else:
            initial_A, initial_B = (widened(factor).to(wide) for factor in initial)
            first = _oriented(initial_A, initial_B * scaling, transposed)
            # Separate products of equal shapes: at step 0 they cancel exactly.
            total = weight + (left @ right - first[0] @ first[1])
        if gain is not None:
            total = total * (gain if transposed else gain[:, None])
        return total.to(dtype).view(stored.shape)


def _oriented(lora_A: Tensor, lora_B: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    return (lora_A.T, lora_B.T) if transposed else (lora_B, lora_A)
