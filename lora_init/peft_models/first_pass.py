"""The first forward pass of an initialized PEFT model shows which adapted layers it uses.

A layer that the model also holds in a list or a closure is called there without its adapter.
Nothing else would show that: the loss falls more slowly, or not at all. A pass with a graph also
shows which layers get no gradient.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_init.model.verification import (
    is_traced,
    no_gradient_message,
    unused_message,
    without_gradient,
)
from lora_init.peft_models.changes import Hook, Operation
from lora_init.peft_models.layers import AdaptedLayer


class FirstPass:
    """A forward hook of the base model. It warns once, and removes all hooks.

    Attributes:
        adapted: PEFT's layers, by name.
        layers: those that were not called yet.
        hooks: what is removed after the first pass.
    """

    def __init__(self, base: nn.Module, layers: list[AdaptedLayer]) -> None:
        self.adapted = {layer.name: layer.module for layer in layers}
        self.layers = {layer.name: layer.module for layer in layers}
        self.hooks = [Hook(one.module, partial(_note_call, self, one.name)) for one in layers]
        self.hooks.append(Hook(base, self))

    def __call__(self, model: nn.Module, *given: Any) -> None:
        if is_traced() or any(m.disable_adapters or m.merged for m in self.layers.values()):
            return
        for hook in self.hooks:
            hook.set(False)
        count = len(self.adapted)
        if self.layers:
            warnings.warn(unused_message(list(self.layers), count), stacklevel=2)
        if torch.is_grad_enabled():
            used = {name: one for name, one in self.adapted.items() if name not in self.layers}
            if still := without_gradient(used, given[-1]):
                warnings.warn(no_gradient_message(still, count), stacklevel=2)


def _note_call(first_pass: FirstPass, name: str, layer: Any, *_: Any) -> None:
    """A forward hook of one adapted layer: it was called."""
    if not layer.disable_adapters:
        first_pass.layers.pop(name, None)


def check_first_pass(base: nn.Module, layers: list[AdaptedLayer], operation: Operation) -> None:
    """Let the first forward pass of a base model warn of adapted layers that it does not use."""
    for hook in FirstPass(base, layers).hooks:
        operation.set(hook, True, is_mark=True)
