"""The first forward pass of a started PEFT model shows which adapted layers it uses.

A layer that the model holds elsewhere too, in a list or a closure, is called there without its
adapter. Nothing else would show that: the loss falls more slowly, or not at all.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lora_init.model.verification import is_traced, unused_message
from lora_init.peft_models.changes import Change
from lora_init.peft_models.layers import AdaptedLayer
from lora_init.peft_models.subtraction import AddHook


class AddPassingHook(AddHook):
    """A hook that is removed for good by the first forward pass."""

    ended = False

    def make(self) -> None:
        if not self.ended:
            super().make()

    def end(self) -> None:
        self.ended = True
        self.undo()


class FirstPass:
    """A forward hook of the base model, and through `Called` of the adapted layers.

    Attributes:
        layers: PEFT's layers that are not called yet, by name.
        hooks: what is removed after the first pass.
    """

    def __init__(self, layers: list[AdaptedLayer]) -> None:
        self.count = len(layers)
        self.layers = {layer.name: layer.module for layer in layers}
        self.hooks: list[AddPassingHook] = []

    def __call__(self, model: nn.Module, *_: Any) -> None:
        if is_traced() or any(m.disable_adapters or m.merged for m in self.layers.values()):
            return
        for hook in self.hooks:
            hook.end()
        if self.layers:
            warnings.warn(unused_message(list(self.layers), self.count), stacklevel=2)


class Called:
    """A forward hook of one adapted layer, which tells `FirstPass` that it was called."""

    def __init__(self, name: str, first_pass: FirstPass) -> None:
        self.name, self.first_pass = name, first_pass

    def __call__(self, layer: nn.Module, *_: Any) -> None:
        if not layer.disable_adapters:
            self.first_pass.layers.pop(self.name, None)


def first_pass(base: nn.Module, layers: list[AdaptedLayer]) -> list[Change]:
    """The changes that check the first forward pass of a base model with adapted layers."""
    check = FirstPass(layers)
    check.hooks = [AddPassingHook(layer.module, Called(layer.name, check)) for layer in layers]
    check.hooks.append(AddPassingHook(base, check))
    return list(check.hooks)
