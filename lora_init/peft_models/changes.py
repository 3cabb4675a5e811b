"""Changes to a PEFT model, and the two ways to undo them.

- While an operation runs, a `Transaction` undoes its changes if anything is raised.
- After it has succeeded, its `Changes` can be taken back at any later time. Taking them back is an
  operation too: if that fails, a transaction returns to the initialized model.

`Changes` are plain data. A copied or pickled model holds the changes of its own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from lora_init.injection import Transaction, hold_plain
from lora_init.injection.editing import add_product
from lora_init.injection.repacking import release
from lora_init.weights.format import Held
from lora_init.weights.kinds import known_format
from lora_init.weights.sharded import assign, is_dtensor, whole


class Absent:
    """The value of an attribute or an item that does not exist."""


@runtime_checkable
class Slot(Protocol):
    """A part of a model that holds one value. Setting the same value twice does nothing."""

    def get(self) -> Any: ...

    def set(self, value: Any) -> None: ...


@dataclass(frozen=True, eq=False)
class Attribute:
    """An attribute of an object itself, or a submodule of a module."""

    owner: Any
    name: str

    def get(self) -> Any:
        # A method of the class is hidden by an attribute of the object, but not replaced.
        submodules = self.owner._modules if isinstance(self.owner, nn.Module) else {}
        return submodules.get(self.name, vars(self.owner).get(self.name, Absent))

    def set(self, value: Any) -> None:
        if value is not Absent:
            setattr(self.owner, self.name, value)
        elif self.get() is not Absent:
            delattr(self.owner, self.name)


@dataclass(frozen=True, eq=False)
class Item:
    """An item of a dictionary."""

    owner: dict[str, Any]
    key: str

    def get(self) -> Any:
        return self.owner.get(self.key, Absent)

    def set(self, value: Any) -> None:
        if value is not Absent:
            self.owner[self.key] = value
        else:
            self.owner.pop(self.key, None)


@dataclass(frozen=True, eq=False)
class Data:
    """The data of a parameter, of any shape. The parameter stays the same object.

    The optimizer and FSDP2 hold the parts of a sharded one, so these are overwritten. Its shape
    cannot change.
    """

    parameter: nn.Parameter

    def get(self) -> Tensor:
        data = self.parameter.data
        return whole(data).clone() if is_dtensor(data) else data

    def set(self, value: Tensor) -> None:
        if is_dtensor(self.parameter):
            if value.shape != self.parameter.shape:
                raise ValueError(
                    f"a factor of shape {tuple(value.shape)} is not supported: must have the shape "
                    f"{tuple(self.parameter.shape)} of PEFT's, which is sharded. Keep the ranks "
                    "(rho=1), or initialize before the model is sharded"
                )
            assign(self.parameter, whole(value))
            return
        # The model may have been moved or cast since the value was read.
        self.parameter.data = value.to(self.parameter.device, self.parameter.dtype)


@dataclass(frozen=True, eq=False)
class Trained:
    """Whether a parameter requires gradients."""

    parameter: nn.Parameter

    def get(self) -> bool:
        return self.parameter.requires_grad

    def set(self, value: bool) -> None:
        self.parameter.requires_grad_(value)


@dataclass(frozen=True, eq=False)
class Hook:
    """Whether a module has this forward hook.

    Attributes:
        before: whether it is a pre-hook, which runs before those that the module has.
    """

    module: nn.Module
    hook: Callable[..., Any]
    before: bool = False

    def _hooks(self) -> dict[int, Any]:
        return self.module._forward_pre_hooks if self.before else self.module._forward_hooks

    def _keys(self) -> list[int]:
        return [key for key, hook in self._hooks().items() if hook is self.hook]

    def get(self) -> bool:
        return bool(self._keys())

    def set(self, value: bool) -> None:
        keys = self._keys()
        if value and not keys and self.before:
            self.module.register_forward_pre_hook(self.hook, with_kwargs=True, prepend=True)
        elif value and not keys:
            self.module.register_forward_hook(self.hook, with_kwargs=True)
        for key in keys if not value else ():
            self.module._forward_hooks_with_kwargs.pop(key, None)
            self.module._forward_pre_hooks_with_kwargs.pop(key, None)
            del self._hooks()[key]


@runtime_checkable
class Initial(Protocol):
    """The initial factors of a layer."""

    initial_A: Tensor
    initial_B: Tensor
    scaling: float


@runtime_checkable
class Step(Protocol):
    """What takes one change back."""

    def undo(self, transaction: Transaction) -> None: ...


@dataclass
class FormerValue:
    """The value of a slot before the change.

    Attributes:
        is_mark: the change has no meaning without the adapter: a hook, a mark or a guard.
    """

    slot: Slot
    value: Any
    is_mark: bool

    def undo(self, transaction: Transaction) -> None:
        transaction.undo_by(partial(self.slot.set, self.slot.get()))
        self.slot.set(self.value)


@dataclass
class Edit:
    """s B0 A0 was subtracted from a float weight; adding it needs no copy of the weight."""

    module: nn.Module
    initial: Initial

    def undo(self, transaction: Transaction) -> None:
        one = self.initial
        add_product(self.module, one.initial_A, one.initial_B, one.scaling, 1, transaction)


@dataclass
class FormerWeight:
    """A weight before it was replaced.

    Attributes:
        held: a copy, or None.
        edit: computes the weight back without a copy; None if that is not possible.
    """

    name: str
    module: nn.Module
    held: Held | None
    edit: Edit | None

    def refuse_lost(self) -> None:
        if self.held is None and self.edit is None:
            raise RuntimeError(
                f"the base weight of {self.name!r} was replaced by a quantized one, and no copy of "
                "it was kept. Initialize with keep_original=True, or load the base model again"
            )

    def undo(self, transaction: Transaction) -> None:
        if self.held is not None:
            one = known_format(self.module)
            present = one.hold(self.module, on_cpu=True)
            transaction.undo_by(partial(one.put_back, self.module, present))
            one.put_back(self.module, self.held)
        elif self.edit is not None:
            self.edit.undo(transaction)


@dataclass
class FormerPacking:
    """The packed weights of bitsandbytes modules before they were kept plain."""

    held: dict[nn.Module, Held]

    def undo(self, transaction: Transaction) -> None:
        release(self.held, transaction)


class Changes(list[Step]):
    """The changes of one operation, in the order in which they were made."""

    def take_back(self, transaction: Transaction) -> None:
        """Take all changes back, from the last to the first.

        Raises:
            RuntimeError: a weight is lost; nothing is changed then.
        """
        for step in self:
            if isinstance(step, FormerWeight):
                step.refuse_lost()
        for step in reversed(self):
            step.undo(transaction)

    def take_marks_back(self) -> None:
        """Take back what has no meaning without the adapter, after the adapter was merged."""
        for step in reversed(self):
            if isinstance(step, FormerValue) and step.is_mark:
                step.undo(Transaction())

    def drop_weights(self) -> None:
        """Forget the copies of weights."""
        for step in self:
            if isinstance(step, FormerWeight):
                step.held = None


class Operation:
    """An operation that changes a PEFT model.

    Attributes:
        transaction: undoes the operation if it fails.
        changes: what it has changed so far.
    """

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction
        self.changes = Changes()

    def set(self, slot: Slot, value: Any, *, is_mark: bool = False) -> None:
        """Give a slot another value."""
        former = slot.get()
        self.transaction.undo_by(partial(slot.set, former))
        slot.set(value)
        self.changes.append(FormerValue(slot, former, is_mark))

    def edit(self, module: nn.Module, one: Initial) -> None:
        """Subtract s B0 A0 from a float weight."""
        factors = one.initial_A, one.initial_B
        add_product(module, *factors, one.scaling, -1, self.transaction)
        self.changes.append(Edit(module, one))

    def replace_weight(
        self, name: str, module: nn.Module, weight: Float[Tensor, "out in"], edit: Edit | None
    ) -> None:
        """Give a module another weight, and keep a copy of the present one in CPU memory."""
        one = known_format(module)
        held = one.hold(module, on_cpu=True)
        self.transaction.undo_by(partial(one.put_back, module, held))
        one.write(module, weight)
        self.changes.append(FormerWeight(name, module, held, edit))

    def keep_plain(self, model: nn.Module) -> None:
        """Keep bitsandbytes from repacking the packed modules of a model."""
        self.changes.append(FormerPacking(hold_plain(model, self.transaction)))
