"""Subtracting s B0 A0 from a fused parameter of experts, which PEFT's `ParamWrapper` adapts.

For each forward pass PEFT replaces the parameter W by W + s B A. On a subtracting start it gets the
factors [B, -B0] and [A; A0] of rank 2r instead. W itself is unchanged, so nothing has to be edited
or restored. At step 0 both products cancel before the sum is rounded to the dtype of W.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.peft_models.start import Start


def subtracting_factors(
    wrapper: Any, start: Start, adapter: str
) -> tuple[Float[Tensor, "experts m rank"], Float[Tensor, "experts rank n"], float]:
    """PEFT's `get_delta_factors`: two factors and a scaling, whose product is added to W."""
    left, right, scaling = type(wrapper).get_delta_factors(wrapper, adapter)
    lora_A, lora_B = start.factors(adapter)
    is_transposed = not wrapper._did_swap_in_out_features
    first, second = (lora_A.mT, -lora_B.mT) if is_transposed else (-lora_B, lora_A)
    left = torch.cat([left, first.to(left)], dim=2)
    return left, torch.cat([right, second.to(right)], dim=1), scaling


def activated(wrapper: Any, adapter: str, active: list[str]) -> AbstractContextManager:
    """PEFT's `_activate_lora`, for one active adapter only.

    Raises:
        ValueError: several adapters are active, and each would subtract the start of one.
    """
    present = [name for name in active if name in wrapper.lora_A]
    if len(present) > 1:
        raise ValueError(
            f"several active adapters ({present}) are not supported with experts: adapter "
            f"{adapter!r} has changed the base of this model. Activate one adapter"
        )
    return type(wrapper)._activate_lora(wrapper, active)
