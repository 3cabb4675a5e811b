"""Putting a weight into a module, and the module's own back: float, tied or packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights import bitsandbytes
from lora_init.weights.kinds import stored_weight


@dataclass(frozen=True)
class Held:
    """What a module's weight was: enough to put exactly that back.

    Attributes:
        parameter: the parameter object. A tied one lives on in the other module.
        data: its data; a copy in CPU memory where `hold` was asked for one.
        packed: a packed module's codes and scales; then the other two are None.
    """

    parameter: nn.Parameter | None
    data: Tensor | None
    packed: bitsandbytes.Held | None = None


def hold(module: nn.Module, *, on_cpu: bool = False) -> Held:
    """Hold the weight that is about to be replaced.

    Args:
        on_cpu: copy a float weight to the CPU, where it may stay for long. Packed weights, an
            eighth of the size, stay on their device, and a tied one is in use there anyway.
    """
    if bitsandbytes.is_packed(module):
        return Held(None, None, bitsandbytes.held(module))
    data = module.weight.data
    return Held(module.weight, data.to("cpu", copy=True) if on_cpu else data)


def put_back(module: nn.Module, held: Held) -> None:
    if held.packed is not None:
        bitsandbytes.put_back(module, held.packed)
        return
    # A model that was converted since (half, double) stays in its dtype.
    data = held.data.to(held.parameter.device, held.parameter.dtype)
    if held.parameter.data.data_ptr() != data.data_ptr():
        held.parameter.data = data
    module.weight = held.parameter


def store_weight(module: nn.Module, weight: Float[Tensor, "out in"], *, own: bool = False) -> None:
    """Give the module new weight data; the old memory is never written to.

    It may be a checkpoint mapped from disk, whose pages would be copied one by one on the first
    write (six times slower on MiniLM), or memory that other processes share.

    Args:
        own: make a parameter of the module's own: the present one is read by another module too.
    """
    if bitsandbytes.is_packed(module):
        bitsandbytes.requantize(module, weight)
        return
    parameter = module.weight
    data = stored_weight(module, weight).to(parameter.device, parameter.dtype)
    data = data.contiguous().view(parameter.shape)
    if own:
        module.weight = nn.Parameter(data, requires_grad=parameter.requires_grad)
    else:
        parameter.data = data


def exchange(parameter: nn.Parameter, data: Tensor) -> Tensor:
    """Give a parameter other data; returns what it had."""
    with torch.no_grad():
        before = parameter.data
        parameter.data = data.to(before.device, before.dtype)
    return before
