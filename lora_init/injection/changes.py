"""Changes that know their inverse: how a model that another library built is changed, and back.

A change is made by calling it once; what it returns is the change that undoes it. A list of those,
called from its end, puts everything back: after a failure in the middle, or when its user asks.
They are plain data, so that a copy of a model holds changes of its own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_init import packed
from lora_init.injection.editing import add_product
from lora_init.injection.plain import hold_plain, release
from lora_init.injection.weights import Held, exchange, hold, put_back, store_weight

Change = Callable[[], Any]


class Absent:
    """Stands for an attribute or an item that is not there."""


@dataclass(frozen=True)
class SetData:
    """Give a parameter other data, of any shape; the parameter stays the same object."""

    parameter: nn.Parameter
    data: Tensor

    def __call__(self) -> SetData:
        return SetData(self.parameter, exchange(self.parameter, self.data))


@dataclass(frozen=True)
class SetAttribute:
    """Set an attribute (of a module also a module), or delete it."""

    owner: Any
    name: str
    value: Any

    def __call__(self) -> SetAttribute:
        before = getattr(self.owner, self.name) if self._is_set() else Absent
        if self.value is Absent:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.value)
        return SetAttribute(self.owner, self.name, before)

    def _is_set(self) -> bool:
        """On the object itself: what its class has, an attribute of its own only covers."""
        if self.name in vars(self.owner):
            return True
        return isinstance(self.owner, nn.Module) and any(
            self.name in held
            for held in (self.owner._modules, self.owner._parameters, self.owner._buffers)
        )


@dataclass(frozen=True)
class SetItem:
    """Set an item of a mapping, or delete it."""

    owner: Any
    key: str
    value: Any

    def __call__(self) -> SetItem:
        # A ModuleDict has no `get`.
        before = self.owner[self.key] if self.key in self.owner else Absent  # noqa: SIM401
        if self.value is Absent:
            del self.owner[self.key]
        else:
            self.owner[self.key] = self.value
        return SetItem(self.owner, self.key, before)


@dataclass(frozen=True)
class SetFlag:
    """Let a parameter require gradients, or not."""

    parameter: nn.Parameter
    requires_grad: bool

    def __call__(self) -> SetFlag:
        before = self.parameter.requires_grad
        self.parameter.requires_grad_(self.requires_grad)
        return SetFlag(self.parameter, before)


@dataclass(frozen=True)
class StoreWeight:
    """Give a module another weight (out, in); what it was waits in CPU memory.

    Attributes:
        otherwise: the way back where that memory is not to be spent; see `forget`.
    """

    module: nn.Module
    weight: Tensor
    otherwise: Change

    def __call__(self) -> PutBack:
        held = hold(self.module, on_cpu=True)
        store_weight(self.module, self.weight)
        return PutBack(self.module, held, self.otherwise)


@dataclass(frozen=True)
class PutBack:
    """Give a module the weight that was held, to the bit."""

    module: nn.Module
    held: Held
    otherwise: Change

    def __call__(self) -> PutBack:
        now = hold(self.module, on_cpu=True)
        put_back(self.module, self.held)
        return PutBack(self.module, now, self.otherwise)


@dataclass(frozen=True)
class EditWeight:
    """Add ``sign · s B0 A0`` to a float weight; the way back is computed, nothing is kept.

    Attributes:
        initial: has lora_A (rank, in), lora_B (out, rank) and the scaling.
    """

    module: nn.Module
    initial: nn.Module
    sign: int

    def __call__(self) -> EditWeight:
        start = self.initial
        add_product(self.module, start.lora_A, start.lora_B, start.scaling, self.sign)
        return EditWeight(self.module, self.initial, -self.sign)


@dataclass(frozen=True)
class HoldPlain:
    """Keep bitsandbytes from repacking the packed modules of a model."""

    model: nn.Module

    def __call__(self) -> Release:
        return Release(self.model, hold_plain(self.model))


@dataclass(frozen=True)
class Release:
    """Give packed modules back what `HoldPlain` took: their weights and bitsandbytes' habit."""

    model: nn.Module
    plain: dict[nn.Module, packed.Held]

    def __call__(self) -> HoldPlain:
        release(self.plain)
        return HoldPlain(self.model)


@dataclass(frozen=True)
class Lost:
    """A weight that nobody has any more.

    Calling it:

    Raises:
        RuntimeError: `message`.
    """

    message: str

    def __call__(self) -> None:
        raise RuntimeError(self.message)


def forget(changes: Iterable[Change]) -> list[Change]:
    """The same changes without the weights that they hold."""
    return [change.otherwise if isinstance(change, PutBack) else change for change in changes]


def take_back(changes: Iterable[Change]) -> list[Change]:
    """Call the inverses from the last to the first; returns the list that makes all of it again.

    Raises:
        RuntimeError: one of them is lost; nothing is done then.
    """
    changes = list(changes)
    for change in changes:
        if isinstance(change, Lost):
            change()
    return [change() for change in reversed(changes)]
