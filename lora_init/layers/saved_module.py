"""The wrapper of a module in `modules_to_save`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class TrainedModule(nn.Module):
    """A module's trained copy, together with the unchanged original.

    The copy may be float32 in a float16 model, as gradient scaling requires. Its inputs are then
    cast to its dtype, and its outputs to the original's. Unknown attributes are looked up in the
    active module.
    """

    def __init__(self, original_module: nn.Module, trained_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.trained_module = trained_module
        self.adapter_enabled = True
        self.training = original_module.training

    @property
    def active_module(self) -> nn.Module:
        return self.trained_module if self.adapter_enabled else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.adapter_enabled:
            return self.original_module(*args, **kwargs)
        own, given = float_dtype(self.trained_module), float_dtype(self.original_module)
        if own == given:
            return self.trained_module(*args, **kwargs)
        args, kwargs = cast(args, given, own), cast(kwargs, given, own)
        return cast(self.trained_module(*args, **kwargs), own, given)

    def merged_module(self) -> nn.Module:
        """The trained module in the original's dtypes, to replace it."""
        originals = dict(self.original_module.named_parameters())
        originals |= dict(self.original_module.named_buffers())
        own = (*self.trained_module.named_parameters(), *self.trained_module.named_buffers())
        for name, tensor in own:
            tensor.data = tensor.data.to(originals[name].dtype)
            tensor.grad = None
        return self.trained_module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "trained_module"):
                raise
            value = getattr(self.active_module, name)
            if isinstance(value, nn.Parameter) and self.adapter_enabled:
                # Code that reads a weight multiplies it by inputs of the model's dtype.
                dtype = getattr(self.original_module, name).dtype
                return value if value.dtype == dtype else value.to(dtype)
            return value


def trainable_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that requires gradients, in `dtype` if that is wider than the module's dtype."""
    trained = copy.deepcopy(module).requires_grad_(True)

    def widen(tensor: Tensor) -> Tensor:
        wider = tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize
        return tensor.to(dtype) if wider else tensor

    return trained._apply(widen)


def float_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def cast(value: Any, before: torch.dtype | None, after: torch.dtype | None) -> Any:
    """Cast tensors of dtype `before` to `after`, also inside lists, tuples and mappings."""
    return _mapped(lambda t: t.to(after) if t.dtype == before else t, value)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed = {key: _mapped(change, part) for key, part in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, list | tuple):
        parts = [_mapped(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
