"""Where a model's tensors are: in memory, wrapped (FSDP, DeepSpeed), offloaded or not loaded.

A weight on the meta device has a shape but no values. Either Accelerate offloads it: a hook on its
module keeps the values on disk or in CPU memory and loads them for each forward pass. Or it was
never loaded, and only a checkpoint has the values (see `lora_init.weights.source`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FSDP1 = "_fsdp_wrapped_module"
"""The name part that FullyShardedDataParallel inserts for a wrapped module."""

HOOK_ATTRIBUTES = ("_hf_hook", "_old_forward")
"""Attributes that Accelerate sets on a hooked module. A wrapper must not forward them: Accelerate
deletes them from the module on which it finds them when it removes the hook."""


def stored_weight(module: nn.Module, matrix: str = "weight") -> Tensor:
    """The tensor that stores a matrix: that of its name, or else the largest of a packed module."""
    weight = getattr(module, matrix, None)
    if isinstance(weight, Tensor):
        return weight
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return max(own, key=lambda tensor: tensor.nbytes)


def is_hooked(module: nn.Module) -> bool:
    """Whether the module has a hook around its forward, or a forward set on the instance."""
    return has_hooks(module) or "forward" in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook of torch runs when the module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def absence(parameter: Tensor) -> str | None:
    """Why the matrix cannot be read or replaced in place; None if it can."""
    if type(parameter.data).__name__ == "DTensor":
        return "sharded, a DTensor"
    if hasattr(parameter, "ds_id"):
        return "partitioned by DeepSpeed ZeRO-3"
    if parameter.is_meta:
        return "offloaded, on the meta device, or not loaded"
    if type(parameter).__name__ == "FlatParameter" or is_flattened(parameter):
        return "flattened by FullyShardedDataParallel"
    return None


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 stores this matrix as part of a vector; `summon_full_params` restores it.

    The shape alone does not show it, because biases are vectors too.
    """
    return getattr(parameter, "_fsdp_flattened", False) and parameter.ndim < 2


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate offloads the module's direct tensors between forward passes."""
    return _offloading_hook(module) is not None


def offloaded_weight(module: nn.Module, matrix: str = "weight") -> Tensor:
    """A matrix of an offloaded module, mapped from disk or from CPU memory."""
    return _offloading_hook(module).weights_map[matrix].detach()


def is_unloaded(module: nn.Module, matrix: str = "weight") -> bool:
    """Whether a matrix of the module has no values, neither in memory nor offloaded.

    A hook on an enclosing module (`preload_module_classes`) does not count. It stores the weight by
    name, and an adapter changes that name.
    """
    return stored_weight(module, matrix).is_meta and not is_offloaded(module)


def first_unloaded(model: nn.Module, path: str = "") -> str | None:
    """The name of a parameter that is missing for a forward pass, or None."""
    hook = _offloading_hook(model)
    if hook is not None and hook.place_submodules:
        return None
    if hook is None:
        for name, parameter in model.named_parameters(path, recurse=False):
            if parameter.is_meta:
                return name
    found = (first_unloaded(child, f"{path}.{name}".removeprefix("."))
             for name, child in model.named_children())  # fmt: skip
    return next((name for name in found if name is not None), None)


def factor_device(module: nn.Module, matrix: str = "weight") -> torch.device:
    """The device of a matrix's factors: that of the matrix during the forward pass.

    It is the CPU if the weight is not loaded.
    """
    weight = stored_weight(module, matrix)
    if not weight.is_meta:
        return weight.device
    device = getattr(_offloading_hook(module), "execution_device", None)
    return torch.device("cpu" if device is None else device)


def _offloading_hook(module: nn.Module) -> Any:
    hook: Any = getattr(module, HOOK_ATTRIBUTES[0], None)
    for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
        if getattr(one, "offload", False) and one.weights_map is not None:
            return one
    return None
