"""A module of `modules_to_save`."""

from __future__ import annotations

from typing import Any

from torch import nn


class TrainedModule(nn.Module):
    """A trained copy of a module beside the untouched original.

    Attributes of the module inside are reachable through this one.
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
        return self.active_module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "trained_module"):
                raise
            return getattr(self.active_module, name)
