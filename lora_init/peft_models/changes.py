"""Changes to a model that can be undone, also after an interrupt in the middle of one.

A change is recorded before it is made (`make`), and both directions may be repeated: `undo` after
an interrupted `make`, or `make` after an interrupted `undo`, completes it. An exception at any
line therefore loses nothing that is needed to go back.

Changes are plain data. A copied or pickled model holds changes of its own modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_init.factors import low_rank_product, widened
from lora_init.injection.weights import Held, hold, put_back, store_weight
from lora_init.weights import bitsandbytes
from lora_init.weights.kinds import oriented_weight


class Absent:
    """Stands for an attribute or an item that does not exist."""


class Change:
    """Something that is done to a model, and how to undo it."""

    def make(self) -> None:
        """Make the change, or complete it. Does nothing if it is made already."""
        raise NotImplementedError

    def undo(self) -> None:
        """Undo the change, or complete that. Does nothing if it is not made."""
        raise NotImplementedError

    def without_weights(self) -> Change:
        """The same change without a copy of the weight that it replaced."""
        return self


class Exchange(Change):
    """A change of one value. Undoing it keeps the present value, which may be trained by then.

    Attributes:
        old, new: the value before and after.
    """

    def __init__(self, new: Any) -> None:
        self.old = self.get()
        self.new = new

    def get(self) -> Any:
        raise NotImplementedError

    def set(self, value: Any) -> None:
        raise NotImplementedError

    def is_old(self) -> bool:
        now = self.get()
        plain = (bool, int, float, str)
        return now is self.old or (isinstance(now, plain) and now == self.old)

    def make(self) -> None:
        if self.is_old():
            self.set(self.new)

    def undo(self) -> None:
        if not self.is_old():
            self.new = self.get()
            self.set(self.old)


class SetData(Exchange):
    """Give a parameter other data, of any shape. The parameter stays the same object."""

    def __init__(self, parameter: nn.Parameter, data: Tensor) -> None:
        self.parameter = parameter
        super().__init__(data.to(parameter.device, parameter.dtype))

    def get(self) -> Tensor:
        return self.parameter.data

    def set(self, value: Tensor) -> None:
        with torch.no_grad():
            self.parameter.data = value

    def is_old(self) -> bool:
        now = self.parameter.data
        if (self.old.device, self.old.dtype) != (now.device, now.dtype):
            self.old = self.old.to(now.device, now.dtype)  # the model was moved or cast since
            return False
        return now.data_ptr() == self.old.data_ptr() and now.shape == self.old.shape


class SetAttribute(Exchange):
    """Set an attribute (of a module also a submodule), or delete it with `Absent`."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name = owner, name
        super().__init__(value)

    def get(self) -> Any:
        # The object's own attributes only. One of its class is only covered.
        for held in ("_modules", "_parameters", "_buffers"):
            if isinstance(self.owner, nn.Module) and self.name in getattr(self.owner, held):
                return getattr(self.owner, held)[self.name]
        return vars(self.owner).get(self.name, Absent)

    def set(self, value: Any) -> None:
        if value is Absent:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)


class SetItem(Exchange):
    """Set an item of a mapping, or delete it with `Absent`."""

    def __init__(self, owner: Any, key: str, value: Any) -> None:
        self.owner, self.key = owner, key
        super().__init__(value)

    def get(self) -> Any:
        # A ModuleDict has no `get`.
        return self.owner[self.key] if self.key in self.owner else Absent  # noqa: SIM401

    def set(self, value: Any) -> None:
        if value is Absent:
            del self.owner[self.key]
        else:
            self.owner[self.key] = value


class SetFlag(Exchange):
    """Let a parameter require gradients, or not."""

    def __init__(self, parameter: nn.Parameter, requires_grad: bool) -> None:
        self.parameter = parameter
        super().__init__(requires_grad)

    def get(self) -> bool:
        return self.parameter.requires_grad

    def set(self, value: bool) -> None:
        self.parameter.requires_grad_(value)


class StoreWeight(Change):
    """Give a module another weight (out, in). The weight before it waits in CPU memory.

    Args:
        otherwise: the way back where that memory must not be spent.
    """

    def __init__(self, module: nn.Module, weight: Tensor, otherwise: Change) -> None:
        self.module, self.weight, self.otherwise = module, weight, otherwise
        self.old = hold(module, on_cpu=True)
        self.new: Held | None = None
        self.made = False

    def make(self) -> None:
        if self.new is not None:
            put_back(self.module, self.new)
        elif not self.made:
            store_weight(self.module, self.weight)
        self.made, self.new, self.weight = True, None, None

    def undo(self) -> None:
        if self.made and self.new is None:
            self.new = hold(self.module, on_cpu=True)
        put_back(self.module, self.old)
        self.made = False

    def without_weights(self) -> Change:
        return self.otherwise


class EditWeight(Change):
    """Subtract s B0 A0 from a module's weight. The way back is computed; no copy is kept.

    The weight gets new memory both ways. Where an interrupt hits, that memory's address tells
    whether the weight was exchanged.

    Attributes:
        initial: has initial_A (rank, in), initial_B (out, rank) and the scaling.
        state: whether the edit is made, and the address of the weight that is being exchanged.
    """

    def __init__(self, module: nn.Module, initial: nn.Module, *, made: bool = False) -> None:
        self.module, self.initial = module, initial
        self.state: tuple[bool, int | None] = made, None

    def make(self) -> None:
        self._bring(True)

    def undo(self) -> None:
        self._bring(False)

    @torch.no_grad()
    def _bring(self, wanted: bool) -> None:
        made, address = self.state
        if address is not None:  # interrupted
            made = made if self.module.weight.data_ptr() == address else not made
            self.state = made, None
        if made == wanted:
            return
        start = self.initial
        product = low_rank_product(start.initial_A, start.initial_B, start.scaling)
        weight = widened(oriented_weight(self.module))
        changed = torch.add(weight, product.to(weight.device), alpha=-1 if wanted else 1)
        self.state = made, self.module.weight.data_ptr()
        store_weight(self.module, changed)
        self.state = wanted, None


class KeepPlain(Change):
    """Keep bitsandbytes from repacking a packed module."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.old = module, bitsandbytes.held(module)

    def make(self) -> None:
        bitsandbytes.keep_plain(self.module)

    def undo(self) -> None:
        bitsandbytes.put_back(self.module, self.old)


class Lost(Change):
    """A weight of which no copy exists.

    Undoing it:

    Raises:
        RuntimeError: `message`.
    """

    def __init__(self, message: str) -> None:
        self.message = message

    def make(self) -> None:
        pass

    def undo(self) -> None:
        raise RuntimeError(self.message)


class Journal(list[Change]):
    """The changes of one operation, in the order in which they were begun."""

    def do(self, change: Change) -> None:
        self.append(change)
        change.make()

    def make(self) -> None:
        """Make all changes, as far as they are undone."""
        for change in self:
            change.make()

    def undo(self) -> None:
        """Undo all changes from the last to the first, as far as they are made."""
        for change in reversed(self):
            change.undo()

    def take_back(self) -> None:
        """Undo all changes, or none of them if anything is raised.

        Raises:
            RuntimeError: one of them is lost.
        """
        for change in self:
            if isinstance(change, Lost):
                change.undo()
        try:
            self.undo()
        except BaseException:
            self.make()
            raise

    def without_weights(self) -> Journal:
        return Journal(change.without_weights() for change in self)


def keep_plain(model: nn.Module) -> list[KeepPlain]:
    """A change for every packed module of a model."""
    return [KeepPlain(module) for module in model.modules() if bitsandbytes.is_quantized(module)]
