"""Undo all changes to a model if one of them fails.

Each undo is recorded before its change. It restores the earlier state, so it is correct whether the
change was completed, interrupted or never started, and it may run twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_init.weights.format import WEIGHT
from lora_init.weights.kinds import known_format

Result = TypeVar("Result")
Undo = Callable[[], Any]


class Transaction:
    """A stack of undo functions for the changes made so far."""

    def __init__(self) -> None:
        self._undos: list[Undo] = []

    def undo_by(self, undo: Undo) -> None:
        """Record an undo function that may be called at any time, and twice."""
        self._undos.append(undo)

    def attributes(self, owner: Any, *names: str) -> None:
        """Record attributes of `owner`: flags, submodules, buffers, dictionaries."""
        values = {name: getattr(owner, name) for name in names}
        before = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in values.items()}
        self.undo_by(partial(_set_attributes, owner, before))

    def weight(self, module: nn.Module, matrix: str = WEIGHT) -> None:
        """Record a matrix of `module`. The old weight stays in memory until the end."""
        one = known_format(module)
        self.undo_by(partial(one.put_back, module, one.hold(module, matrix)))

    def data(self, parameter: Tensor) -> None:
        """Record the data of `parameter`, which will be rebound but not overwritten."""
        self.undo_by(partial(setattr, parameter, "data", parameter.data))

    def values(self, module: nn.Module, name: str) -> None:
        """Copy the values of a parameter or buffer, which will be overwritten."""
        held: Any = module._parameters if name in module._parameters else module._buffers
        value = held[name]
        self.undo_by(partial(_set_values, held, name, value, value.detach().clone()))

    def gradient_flags(self, parameters: Iterable[nn.Parameter]) -> None:
        """Record the `requires_grad` flags of `parameters`."""
        flags = [(parameter, parameter.requires_grad) for parameter in parameters]
        self.undo_by(partial(set_gradient_flags, flags))

    def roll_back(self) -> None:
        """Undo all changes in reverse order. An interrupt is re-raised afterwards.

        Raises:
            RuntimeError: a change could not be undone. All others were undone.
        """
        failure, interrupt = None, None
        while self._undos:
            try:
                self._undos[-1]()
            except KeyboardInterrupt as error:  # finish first: call the same undo again
                interrupt = error
                continue
            except Exception as error:
                failure = failure or error
            self._undos.pop()
        if failure is not None:
            raise RuntimeError(
                f"a change that failed could not be undone ({failure!r}); reload the base model"
            ) from failure
        if interrupt is not None:
            raise interrupt


def atomically(make: Callable[[Transaction], Result]) -> Result:
    """Call ``make(transaction)``. If it raises, undo its changes first."""
    transaction = Transaction()
    try:
        return make(transaction)  # return directly: a signal could arrive in a later line
    except BaseException:
        transaction.roll_back()
        raise


def set_gradient_flags(flags: Iterable[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _set_attributes(owner: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


@torch.no_grad()
def _set_values(held: dict[str, Tensor | None], name: str, tensor: Tensor, values: Tensor) -> None:
    held[name] = tensor
    tensor.copy_(values)
