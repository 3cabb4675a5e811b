"""Where a live model's tensors are: here and whole, with what wraps the model, or not loaded.

A weight on the meta device has a shape and no values. Either Accelerate offloads it: a hook on its
module holds the values, on disk or in CPU memory, and puts them in place for a forward pass; or it
was never loaded, and only a checkpoint has them (see `lora_init.weights.source`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FSDP1 = "_fsdp_wrapped_module"
"""What FullyShardedDataParallel puts into the names of what it wraps."""

HOOK_ATTRIBUTES = ("_hf_hook", "_old_forward")
"""What Accelerate hangs on a module that it puts a hook on. A wrapper must not pass for it: a hook
that is taken off is deleted where it seems to be."""


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook runs around the module's forward, or the instance has a forward attribute."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def absence(parameter: Tensor) -> str | None:
    """Why the matrix cannot be read or exchanged in place; None where it can."""
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
    """Whether FSDP1 holds this matrix as a piece of a vector; `summon_full_params` gives it back.

    A vector's shape does not tell.
    """
    return getattr(parameter, "_fsdp_flattened", False) and parameter.ndim < 2


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate keeps the module's own tensors elsewhere between forward passes."""
    return _offloading_hook(module) is not None


def offloaded_weight(module: nn.Module) -> Tensor:
    """The weight of an offloaded module, mapped from the disk or from CPU memory."""
    return _offloading_hook(module).weights_map["weight"].detach()


def is_unloaded(module: nn.Module) -> bool:
    """Whether the module's weight has no values, neither here nor offloaded.

    A hook on a module around it (`preload_module_classes`) does not count: it knows the weight by a
    name that an adapter changes.
    """
    return module.weight.is_meta and not is_offloaded(module)


def first_unloaded(model: nn.Module, path: str = "") -> str | None:
    """The name of a parameter without which the model cannot run a forward pass."""
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


def factor_device(module: nn.Module) -> torch.device:
    """Where a module's factors belong: with its weight, or where that is put for a forward pass.

    The CPU where it is not loaded.
    """
    if not module.weight.is_meta:
        return module.weight.device
    device = getattr(_offloading_hook(module), "execution_device", None)
    return torch.device("cpu" if device is None else device)


def _offloading_hook(module: nn.Module) -> Any:
    hook = getattr(module, HOOK_ATTRIBUTES[0], None)
    for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
        if getattr(one, "offload", False) and one.weights_map is not None:
            return one
    return None
