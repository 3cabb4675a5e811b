"""One operation on a PEFT model: it is done, or the model is as it was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from lora_init.peft_models.changes import Change, Journal
from lora_init.peft_models.start import records

T = TypeVar("T")


class KeepModes(Change):
    """Nothing to make. Undoing it restores modes, flags and gradients, and drops later hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [
            (module, module.training, {*module._forward_hooks, *module._forward_pre_hooks})
            for module in model.modules()
        ]
        self.parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def make(self) -> None:
        pass

    def undo(self) -> None:
        for module, training, hooks in self.modules:
            module.training = training
            for held in (module._forward_hooks, module._forward_pre_hooks):
                for key in held.keys() - hooks:
                    del held[key]
        for parameter, flag, gradient in self.parameters:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def attempt(peft_model: nn.Module, adapter_name: str, start: Callable[[Journal, Journal], T]) -> T:
    """Undo an adapter's present start, and call `start` for another one.

    If anything is raised, an interrupt included, the present start is made again.

    Args:
        start: called with the journal of the new start, and with one for what is undone at its
            end anyway.
    """
    done, wrappers = Journal(), Journal()
    record = records(peft_model).get(adapter_name)
    taken = Journal() if record is None else record.changes
    modes = KeepModes(peft_model)
    try:
        taken.take_back()
        return start(done, wrappers)
    except BaseException:
        wrappers.undo()
        wrappers.clear()
        modes.undo()
        done.undo()
        taken.make()
        raise
