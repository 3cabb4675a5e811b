"""Models that hold PEFT's layers without a PeftModel: transformers', diffusers', any module.

`add_adapter` and `inject_adapter_in_model` put the layers into the model itself, and the programs
that save, weight, merge and remove them work on the layers. On a changed base:

- They save the adapter's configuration by its `to_dict`. It states the rank 2r of the tensors that
  `state_dict` gives.
- `unload_lora` and `unload_lora_weights` restore the base, unless the adapter is merged into it.
- A deleted adapter's initialization is undone first.
- Further adapters are refused: they would be trained on, or loaded into, another base.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import nn

from lora_init.injection import Transaction, atomically
from lora_init.peft_models.changes import Attribute, Item, Operation
from lora_init.peft_models.exported import exported_peft_config
from lora_init.peft_models.holder import refuse_merged
from lora_init.peft_models.layers import AdaptedLayer, adapted_layers
from lora_init.peft_models.start import Record, base_owner, records
from lora_init.peft_models.state_dict import is_called_by

ADDING = ("add_adapter", "load_adapter", "load_lora_adapter")
REMOVING = ("recurse_remove_peft_layers",)
"""The function of diffusers that takes every layer out of a model."""


def own_peft_config(model: Any, adapter: str, operation: Operation) -> None:
    """Give a model its own copy of an adapter's configuration, which other models may use too."""
    operation.set(Item(model.peft_config, adapter), copy.copy(model.peft_config[adapter]))


def guard_injected(model: Any, layers: list[AdaptedLayer], operation: Operation) -> None:
    """Replace the methods of a model, its layers and its configuration; see above.

    Args:
        layers: of the adapter that is initialized.
    """
    adapter = layers[0].adapter
    record = records(model)[adapter]

    def replace(owner: Any, name: str, function: Any) -> None:
        operation.set(Attribute(owner, name), function, is_mark=True)

    for layer in layers:
        deletes = partial(delete_from_layer, model, layer.module, adapter)
        replace(layer.module, "delete_adapter", deletes)
    if not record.changed_base:
        return
    for layer in layers:
        replace(layer.module, "get_base_layer", partial(base_layer, model, layer.module))
        replace(layer.module, "update_layer", partial(refuse_adapter, model, "update_layer"))
    for name in ADDING:
        if hasattr(model, name):
            replace(model, name, partial(refuse_adapter, model, name))
    config = model.peft_config[adapter]
    replace(config, "to_dict", partial(exported_values, config, record.config, record.plan))


def exported_values(peft_config: Any, *start: Any) -> dict[str, Any]:
    """PEFT's `to_dict`, of the configuration for the original base.

    Raises:
        ValueError: the base was replaced, so the adapter has no form on the original one.
    """
    config, plan = start
    if plan.replaced:
        raise ValueError(
            f"saving this adapter in PEFT's format is not supported: {plan.initializer.name} has "
            "replaced the base by a quantized one. Call lora_init.save_peft_model(model, folder)"
        )
    converted = exported_peft_config(peft_config, config, plan)
    return type(converted).to_dict(converted)


def refuse_adapter(model: Any, function: str, *_: Any, **__: Any) -> None:
    """Refuse a second adapter on a changed base.

    Raises:
        ValueError: always.
    """
    owner = base_owner(model)
    raise ValueError(
        f"{function} is not supported: adapter {owner!r} has changed the base of this model, and "
        "another adapter is for the original one. Call "
        f"restore_peft_model(model, {owner!r}) first, or load_peft_checkpoint for a checkpoint of "
        "this adapter"
    )


def delete_from_layer(model: Any, layer: Any, initialized: str, adapter_name: str) -> None:
    """PEFT's `delete_adapter` of a layer, after the adapter's initialization is undone.

    Raises:
        ValueError: an adapter is merged.
    """
    if adapter_name == initialized:
        refuse_merged(model, "delete_adapter")
        atomically(records(model)[adapter_name].changes.take_back)
    type(layer).delete_adapter(layer, adapter_name)


def base_layer(model: Any, layer: Any) -> nn.Module:
    """PEFT's `get_base_layer`. If the layers are being removed, the base is restored first.

    A merged adapter stays in the weights, and only its hooks are removed.

    Raises:
        ValueError: some layers are merged, and others are not.
    """
    if any(map(is_called_by, REMOVING)):
        _release(model)
    return type(layer).get_base_layer(layer)


def _release(model: Any) -> None:
    initialized: list[Record] = list(records(model).values())
    layers = [one for name in records(model) for one in adapted_layers(model, name, checked=False)]
    merged = [bool(layer.module.merged_adapters) for layer in layers]
    if all(merged):
        for record in initialized:
            record.changes.take_marks_back()
        records(model).clear()
        return
    if any(merged):
        raise ValueError(
            f"removing the adapters is not supported: {layers[merged.index(True)].name!r} is "
            f"merged, and {layers[merged.index(False)].name!r} is not. Call unfuse_lora() first, "
            "or merge all layers"
        )

    def take_back(transaction: Transaction) -> None:
        for record in initialized:
            record.changes.take_back(transaction)

    atomically(take_back)
