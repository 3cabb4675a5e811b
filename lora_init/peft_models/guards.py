"""PEFT's own methods on a started model. Each would silently do something else without these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_init.peft_models.changes import Change, Journal, SetAttribute
from lora_init.peft_models.layers import START, AdaptedLayer, refuse_merged, wrapper_places
from lora_init.peft_models.save import save_pretrained
from lora_init.peft_models.start import base_owner, records
from lora_init.peft_models.state_dict import StateDictHooks, layers_like
from lora_init.peft_models.subtraction import AddHook


@dataclass(frozen=True)
class Guard:
    """One of PEFT's methods, replaced on one model while it is started.

    An object rather than a bound method or a closure, so that a copy of the model is guarded by
    itself and the model can be pickled.
    """

    function: Callable[..., Any]
    model: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.model, *args, **kwargs)


@dataclass(frozen=True)
class RefuseUpdate:
    """A layer's `update_layer`, by which PEFT would give a started adapter new factors."""

    layer: nn.Module
    adapter: str

    def __call__(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if adapter_name == self.adapter:
            raise ValueError(
                f"adapter_name={adapter_name!r} is not supported: these layers hold an adapter of "
                "that name, started by initialize_peft_model. Delete it first "
                "(peft_model.delete_adapter), or pass the plain base (peft_model.unload())"
            )
        return type(self.layer).update_layer(self.layer, adapter_name, *args, **kwargs)


def guard(
    peft_model: nn.Module,
    layers: list[AdaptedLayer],
    done: Journal,
    load_adapter: Callable[..., Any],
) -> None:
    """Replace PEFT's methods that have to know that an adapter is started.

    Args:
        layers: of the adapter that is started.
        load_adapter: for PEFT's method of that name.
        done: gets every change before it is made.
    """
    tuner = peft_model.base_model
    guards: list[tuple[nn.Module, str, Callable[..., Any]]] = [
        (tuner, "delete_adapter", delete_adapter),
        (tuner, "unload", unload),
        (tuner, "merge_and_unload", merge_and_unload),
    ]
    if records(peft_model)[layers[0].adapter].changed_base:
        guards += [
            (peft_model, "save_pretrained", save_pretrained),
            (peft_model, "load_adapter", load_adapter),
            (tuner, "add_weighted_adapter", add_weighted_adapter),
        ]
        if hasattr(tuner.model, "save_pretrained"):
            guards.append((tuner.model, "save_pretrained", save_base))
    for owner, name, function in guards:
        if not isinstance(vars(owner).get(name), Guard):
            done.do(SetAttribute(owner, name, Guard(function, peft_model)))
    for layer in layers:
        refuse = RefuseUpdate(layer.module, layer.adapter)
        done.do(SetAttribute(layer.module, "update_layer", refuse))
    if records(peft_model)[layers[0].adapter].changed_base:
        done.do(StateDictHooks(peft_model))


def delete_adapter(peft_model: nn.Module, adapter_name: str) -> None:
    """PEFT's `delete_adapter`; what `initialize_peft_model` did for the adapter is undone first.

    Raises:
        ValueError: other adapters are used on the changed base, or an adapter is merged.
    """
    tuner = peft_model.base_model
    record = records(peft_model).get(adapter_name)
    if record is None:
        type(tuner).delete_adapter(tuner, adapter_name)
        return
    refuse_merged(peft_model, "delete_adapter")
    others = [name for name in peft_model.peft_config if name != adapter_name]
    if others and record.changed_base:
        raise ValueError(
            f"delete_adapter({adapter_name!r}): adapter {others[0]!r} was trained on the base "
            f"that {adapter_name!r} has changed; delete it first"
        )
    try:
        record.changes.take_back()
        type(tuner).delete_adapter(tuner, adapter_name)
    except BaseException:
        if adapter_name in peft_model.peft_config:
            record.changes.make()
        raise


def unload(peft_model: nn.Module) -> nn.Module:
    """PEFT's `unload`, after every initialization is undone: the original base.

    Raises:
        ValueError: an adapter is merged into a changed base.
        RuntimeError: a base was replaced and its original was not kept.
    """
    tuner = peft_model.base_model
    if base_owner(peft_model) is not None:
        refuse_merged(peft_model, "unload")
    present = list(records(peft_model).values())
    wrappers = wrapper_places(peft_model)
    try:
        for record in present:
            record.changes.take_back()
        return type(tuner).unload(tuner)
    except BaseException:
        wrappers.undo()
        for record in present:
            record.changes.make()
        raise


def merge_and_unload(
    peft_model: nn.Module,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> nn.Module:
    """PEFT's `merge_and_unload`; nothing of this package stays in the model that it returns.

    Raises:
        ValueError: the adapters do not cover the layers whose base was changed.
    """
    tuner = peft_model.base_model
    owner = base_owner(peft_model)
    if owner is not None:
        for name in adapter_names or peft_model.active_adapters:
            layers_like(peft_model, name)
    merged = type(tuner).merge_and_unload(tuner, progressbar, safe_merge, adapter_names)
    for record in list(records(peft_model).values()):
        for change in reversed(record.changes):
            if _ends_with_merge(change):
                change.undo()
    records(peft_model).clear()
    return merged


def _ends_with_merge(change: Change) -> bool:
    """Whether a change makes no sense without the adapter: hooks, marks and guards."""
    if isinstance(change, SetAttribute):
        return change.name == START or isinstance(change.new, Guard)
    return isinstance(change, AddHook | StateDictHooks)


def add_weighted_adapter(peft_model: nn.Module, *_: Any, **__: Any) -> None:
    """Refuse PEFT's `add_weighted_adapter`: the sum would count the change of the base wrongly.

    Raises:
        ValueError: always.
    """
    owner = base_owner(peft_model)
    raise ValueError(
        f"add_weighted_adapter is not supported: adapter {owner!r} has changed the base of this "
        "model. Save the adapters (save_pretrained), and combine them on the original base"
    )


def save_base(peft_model: nn.Module, *_: Any, **__: Any) -> None:
    """Refuse the base model's `save_pretrained`: its weights are not the original ones.

    Raises:
        ValueError: always.
    """
    owner = base_owner(peft_model)
    raise ValueError(
        f"save_pretrained of the base model is not supported: adapter {owner!r} is in it. Call "
        "peft_model.save_pretrained() for the adapter, or save what merge_and_unload() or "
        "unload() returns"
    )
