"""Replace a module's weight and put the original back: float, tied or packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights import bitsandbytes
from lora_init.weights.kinds import stored_weight


@dataclass(frozen=True)
class Held:
    """A module's weight before it was replaced, to restore it exactly.

    Attributes:
        parameter: the parameter object. A tied one stays in use in the other module.
        data: the parameter's data, or a CPU copy of it.
        packed: the codes and scales of a packed module; the other two are then None.
    """

    parameter: nn.Parameter | None
    data: Tensor | None
    packed: bitsandbytes.Held | None = None


def hold(module: nn.Module, *, on_cpu: bool = False) -> Held:
    """Record the weight that is about to be replaced.

    Args:
        on_cpu: copy a float weight to CPU memory, for long storage. Packed weights stay on their
            device because they are small. Tied weights stay because they are in use there.
    """
    if bitsandbytes.is_packed(module):
        return Held(None, None, bitsandbytes.held(module))
    data = module.weight.data
    return Held(module.weight, data.to("cpu", copy=True) if on_cpu else data)


def put_back(module: nn.Module, held: Held) -> None:
    if held.packed is not None:
        bitsandbytes.put_back(module, held.packed)
        return
    # A model that was converted in the meantime (half, double) keeps its dtype.
    data = held.data.to(held.parameter.device, held.parameter.dtype)
    if held.parameter.data.data_ptr() != data.data_ptr():
        held.parameter.data = data
    module.weight = held.parameter


def store_weight(module: nn.Module, weight: Float[Tensor, "out in"], *, own: bool = False) -> None:
    """Store new weight data in the module; the old memory is not written to.

    The old memory may be a checkpoint mapped from disk, which a write would copy page by page, or
    memory that other processes share.

    Args:
        own: create a new parameter, because another module uses the present one too.
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
    """Replace a parameter's data; return the old data."""
    with torch.no_grad():
        before = parameter.data
        parameter.data = data.to(before.device, before.dtype)
    return before
