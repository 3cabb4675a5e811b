"""PEFT's own methods on an initialized model. Without these, each would silently be wrong.

The functions replace methods by `functools.partial`. Unlike bound methods and closures, partial
objects are copied and pickled with the model that they hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lora_init.injection import Transaction, atomically
from lora_init.peft_models.apply import other_adapter
from lora_init.peft_models.changes import Attribute, Operation
from lora_init.peft_models.holder import is_peft_model, refuse_merged, wrappers
from lora_init.peft_models.injected import guard_injected
from lora_init.peft_models.layers import AdaptedLayer
from lora_init.peft_models.save import save_pretrained
from lora_init.peft_models.start import base_owner, records
from lora_init.peft_models.state_dict import StateDictHooks, layers_like


def guard(
    peft_model: Any,
    layers: list[AdaptedLayer],
    operation: Operation,
    load_adapter: Callable[..., Any],
) -> None:
    """Replace PEFT's methods that must know about an initialized adapter.

    `lora_init.peft_models.injected` has those of a model that is not a PeftModel.

    Args:
        layers: of the adapter that is initialized.
        load_adapter: for PEFT's method of that name.
    """
    for layer in layers:
        guarded = partial(update_layer, layer.module, layer.adapter)
        operation.set(Attribute(layer.module, "update_layer"), guarded, is_mark=True)
    changed_base = records(peft_model)[layers[0].adapter].changed_base
    if changed_base:
        operation.set(StateDictHooks(peft_model), True, is_mark=True)
    if not is_peft_model(peft_model):
        guard_injected(peft_model, layers, operation)
        return
    tuner = peft_model.base_model
    guards = [
        (tuner, "delete_adapter", delete_adapter),
        (tuner, "unload", unload),
        (tuner, "merge_and_unload", merge_and_unload),
    ]
    if changed_base:
        guards += [
            (peft_model, "save_pretrained", save_pretrained),
            (peft_model, "load_adapter", load_adapter),
            (peft_model, "add_adapter", add_adapter),
            (tuner, "add_weighted_adapter", refuse_weighted_adapter),
        ]
        if hasattr(tuner.model, "save_pretrained"):
            guards.append((tuner.model, "save_pretrained", refuse_save_of_base))
    for owner, name, function in guards:
        if getattr(vars(owner).get(name), "func", None) is not function:
            operation.set(Attribute(owner, name), partial(function, peft_model), is_mark=True)


def add_adapter(peft_model: Any, adapter_name: str, *args: Any, **settings: Any) -> None:
    """Call PEFT's `add_adapter`, and warn that the base was changed."""
    type(peft_model).add_adapter(peft_model, adapter_name, *args, **settings)
    owner = base_owner(peft_model)
    warnings.warn(
        f"adapter {adapter_name!r} is for the base that {owner!r} has changed. With new factors, "
        f"the output is not that of the original model. Copy the factors of {owner!r} into it, or "
        f"call restore_peft_model(peft_model, {owner!r}) first",
        stacklevel=2,
    )


def delete_adapter(peft_model: Any, adapter_name: str) -> None:
    """PEFT's `delete_adapter`, after the adapter's initialization is undone.

    Raises:
        ValueError: other adapters are used on the changed base, or an adapter is merged.
    """
    tuner = peft_model.base_model
    record = records(peft_model).get(adapter_name)
    if record is None:
        type(tuner).delete_adapter(tuner, adapter_name)
        return
    refuse_merged(peft_model, "delete_adapter")
    other = other_adapter(peft_model, adapter_name)
    if record.changed_base and other is not None:
        raise ValueError(
            f"delete_adapter({adapter_name!r}) is not supported: adapter {other!r} was trained on "
            f"the base that {adapter_name!r} has changed. Delete {other!r} first"
        )
    transaction = Transaction()
    try:
        record.changes.take_back(transaction)
        type(tuner).delete_adapter(tuner, adapter_name)
    except BaseException:
        if adapter_name in peft_model.peft_config:  # else PEFT has deleted a part of it
            transaction.roll_back()
        raise


def unload(peft_model: Any) -> nn.Module:
    """PEFT's `unload`, after every initialization is undone: the original base.

    Raises:
        ValueError: an adapter is merged into a changed base.
        RuntimeError: a base was replaced and its original was not kept.
    """
    if base_owner(peft_model) is not None:
        refuse_merged(peft_model, "unload")
    return atomically(partial(_unload, peft_model))


def _unload(peft_model: Any, transaction: Transaction) -> nn.Module:
    tuner = peft_model.base_model
    for record in list(records(peft_model).values()):
        record.changes.take_back(transaction)
    for _, place in wrappers(peft_model):
        transaction.undo_by(partial(place.put, place.module))
    return type(tuner).unload(tuner)


def merge_and_unload(
    peft_model: Any,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> nn.Module:
    """PEFT's `merge_and_unload`; nothing of this package stays in the model that it returns.

    Raises:
        ValueError: the adapters do not cover the layers whose base was changed.
    """
    tuner = peft_model.base_model
    if base_owner(peft_model) is not None:
        for name in adapter_names or peft_model.active_adapters:
            layers_like(peft_model, name)
    merged = type(tuner).merge_and_unload(tuner, progressbar, safe_merge, adapter_names)
    for record in records(peft_model).values():
        record.changes.take_marks_back()
    records(peft_model).clear()
    return merged


def update_layer(layer: Any, adapter: str, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """PEFT's `update_layer` of a layer, which would give an initialized adapter new factors.

    Raises:
        ValueError: the name is that of the initialized adapter.
    """
    if adapter_name == adapter:
        raise ValueError(
            f"adapter_name={adapter_name!r} is not supported: these layers have an adapter of that "
            "name, started by initialize_peft_model. Delete it first (peft_model.delete_adapter), "
            "or pass the plain base (peft_model.unload())"
        )
    type(layer).update_layer(layer, adapter_name, *args, **kwargs)


def refuse_weighted_adapter(peft_model: nn.Module, *_: Any, **__: Any) -> None:
    """Refuse PEFT's `add_weighted_adapter`: the sum would count the change of the base wrongly.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"add_weighted_adapter is not supported: adapter {base_owner(peft_model)!r} has changed "
        "the base of this model. Save the adapters (save_pretrained), and combine them on the "
        "original base"
    )


def refuse_save_of_base(peft_model: nn.Module, *_: Any, **__: Any) -> None:
    """Refuse the base model's `save_pretrained`: its weights are not the original ones.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"save_pretrained of the base model is not supported: adapter {base_owner(peft_model)!r} "
        "has changed its weights. Call peft_model.save_pretrained() for the adapter, or save what "
        "merge_and_unload() or unload() returns"
    )
