"""The state dict of a PEFT model whose base was changed: it describes the original base.

Everything that leaves the process by `state_dict()` is right there: `get_peft_model_state_dict`,
which trainers send to vLLM, and full checkpoints of Accelerate or torch. A and B are [A; A0] and
[B, -B0] of rank 2r, and an edited weight is the original one. `load_state_dict` takes that apart.

A replaced base has no such form. Its full state dict is right as it is: the replaced weights, A
and B. The adapter alone is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.peft_models.changes import Change
from lora_init.peft_models.layers import START, AdaptedLayer, adapted_layers
from lora_init.peft_models.start import Start, base_owner
from lora_init.weights.kinds import stored_weight

# FSDP, activation checkpointing and torch.compile add these to module names, not to keys.
WRAPPER_PREFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class StateDictHooks(Change):
    """Let a PEFT model's `state_dict` and `load_state_dict` speak of the original base."""

    def __init__(self, peft_model: nn.Module) -> None:
        self.model = peft_model

    def make(self) -> None:
        if export not in self.model._state_dict_hooks.values():
            self.model._register_state_dict_hook(export)
        if not any(hook.hook is split for hook in self._loading().values()):
            self.model.register_load_state_dict_pre_hook(split)

    def undo(self) -> None:
        for key, hook in list(self.model._state_dict_hooks.items()):
            if hook is export:
                del self.model._state_dict_hooks[key]
        for key, hook in list(self._loading().items()):
            if hook.hook is split:
                del self._loading()[key]

    def _loading(self) -> dict[int, Any]:
        return self.model._load_state_dict_pre_hooks


def plain_state_dict(peft_model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it is stored, by PEFT's own names."""
    return dict(peft_model.base_model.state_dict(prefix="base_model."))


def layers_like(peft_model: nn.Module, name: str, *, checked: bool = True) -> list[AdaptedLayer]:
    """The layers of an adapter, which must be those of the adapter that changed the base.

    Raises:
        ValueError: it has other layers, ranks or scalings.
    """
    owner = base_owner(peft_model)
    changed = adapted_layers(peft_model, owner, checked=checked)
    layers = adapted_layers(peft_model, name, checked=checked) if name != owner else changed
    wanted = [(layer.name, layer.rank, layer.scaling) for layer in changed]
    if [(layer.name, layer.rank, layer.scaling) for layer in layers] != wanted:
        raise ValueError(
            f"adapter {name!r} has other layers, ranks or scalings than {owner!r}, whose start has "
            "changed the base, so that it cannot be written for the original one; save "
            f"selected_adapters=[{owner!r}]"
        )
    return layers


def changed_start(layer: AdaptedLayer) -> Start:
    """The start that has changed this layer's base."""
    return getattr(layer.base, START)


def extend(state: dict[str, Tensor], path: str, layer: AdaptedLayer) -> None:
    """A and B of a layer become [A; A0] and [B, -B0] in a state dict, if they are not yet."""
    initial = _initial(layer)
    for which, axis in (("lora_A", 0), ("lora_B", 1)):
        key = _key(path, layer, which)
        # A process that does not write gets an empty tensor, or no key.
        if key not in state or state[key].numel() == 0 or state[key].shape[axis] != layer.rank:
            continue
        if type(state[key]).__name__ == "DTensor":
            raise NotImplementedError(
                f"state_dict: {key!r} is sharded (a DTensor), which is not supported for an "
                "adapter that has changed its base; gather the adapter first, or train with a "
                "method that keeps the base"
            )
        part = _shaped(initial[which], state[key], axis)
        state[key] = torch.cat([state[key], part], dim=axis)


def shorten(state: dict[str, Tensor], path: str, layer: AdaptedLayer) -> None:
    """The inverse of `extend`, for a file that holds A0 and B0 apart."""
    for which, axis in (("lora_A", 0), ("lora_B", 1)):
        key = _key(path, layer, which)
        if key in state and state[key].numel():
            state[key] = state[key].narrow(axis, 0, layer.rank)


def export(model: nn.Module, state: dict[str, Tensor], prefix: str, _: dict[str, Any]) -> None:
    """A state-dict hook of a PEFT model: the state for the original base.

    Raises:
        ValueError: an adapter that has no form on the original base.
    """
    _refuse_hotswap(model)
    for path, layer in _changed(model, _started(model)):
        start = changed_start(layer)
        if start.replacement is not None:
            _refuse_adapter_alone(model)
            continue
        extend(state, prefix + path, layer)
        key = f"{prefix}{path}.base_layer.weight"
        if start.base == "edited" and key in state and not layer.module.merged:
            state[key] = _original(layer, start, state[key])


def split(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A hook of `load_state_dict`: takes apart what `export` put together.

    Raises:
        ValueError: a state that is not one of this start; nothing is loaded then.
    """
    for path, layer in _changed(model, _started(model)):
        start = changed_start(layer)
        if start.replacement is not None:
            continue
        initial = _initial(layer)
        for which, axis in (("lora_A", 0), ("lora_B", 1)):
            key = _key(prefix + path, layer, which)
            value = state.get(key)
            if value is None or value.numel() == 0:
                continue
            if value.shape[axis] != 2 * layer.rank:
                raise ValueError(
                    f"load_state_dict: {key!r} has rank {value.shape[axis]}, but this model's "
                    f"start makes it {2 * layer.rank} for the original base. Load what its "
                    "state_dict() or save_pretrained() gave, or call restore_peft_model first"
                )
            own, part = value.split(layer.rank, dim=axis)
            if not torch.equal(part, _shaped(initial[which], own, axis)):
                raise ValueError(
                    f"load_state_dict: {key!r} belongs to another start than this model's; call "
                    "load_peft_checkpoint(peft_model, folder) instead"
                )
            state[key] = own
        key = f"{prefix}{path}.base_layer.weight"
        if start.base == "edited" and key in state and not layer.module.merged:
            state[key] = _edited(layer, start, state[key])


def _started(model: nn.Module) -> list[str]:
    """The adapters whose layers hold a part of the changed base.

    Raises:
        ValueError: one of them has no form on the original base.
    """
    names = [name for name in model.peft_config if adapted_layers(model, name, checked=False)]
    for name in names:
        layers_like(model, name, checked=False)
    return names


def _changed(model: nn.Module, names: list[str]) -> Iterator[tuple[str, AdaptedLayer]]:
    paths = {id(module): path for path, module in model.named_modules()}
    for name in names:
        for layer in adapted_layers(model, name, checked=False):
            path = paths[id(layer.module)]
            for wrapper in WRAPPER_PREFIXES:
                path = path.replace(wrapper, "")
            yield path, layer


def _key(path: str, layer: AdaptedLayer, which: str) -> str:
    suffix = "" if layer.is_embedding else ".weight"
    return f"{path}.{layer.container(which)}.{layer.adapter}{suffix}"


def _initial(layer: AdaptedLayer) -> dict[str, Tensor]:
    lora_A, lora_B = changed_start(layer).factors(layer.adapter)
    return {"lora_A": lora_A, "lora_B": -lora_B}


def _shaped(initial: Tensor, like: Tensor, axis: int) -> Tensor:
    shape = list(like.shape)
    shape[axis] = initial.shape[axis]
    return initial.view(shape).to(like)


def _original(layer: AdaptedLayer, start: Start, weight: Tensor) -> Tensor:
    product = stored_weight(layer.base, start.product()).view(weight.shape)
    return (weight + product.to(weight.device)).to(weight.dtype)


def _edited(layer: AdaptedLayer, start: Start, weight: Tensor) -> Tensor:
    present = layer.base.weight.detach()
    if torch.equal(_original(layer, start, present), weight.to(present)):
        return present  # to the bit
    product = stored_weight(layer.base, start.product()).view(present.shape)
    return (weight - product.to(weight.device)).to(weight.dtype)


def _refuse_adapter_alone(model: nn.Module) -> None:
    """Refuse A and B without the base that they were trained on.

    Raises:
        ValueError: `get_peft_model_state_dict` has asked.
    """
    if _asks("get_peft_model_state_dict"):
        raise ValueError(
            f"get_peft_model_state_dict is not supported: adapter {base_owner(model)!r} has "
            "replaced the base by a quantized one, and its A and B mean nothing on the original "
            "base. Use peft_model.save_pretrained(), or merge_and_unload()"
        )


def _refuse_hotswap(model: nn.Module) -> None:
    """Refuse other factors in the place of those that belong to a changed base.

    Raises:
        ValueError: PEFT's `hotswap_adapter` has asked.
    """
    if _asks("hotswap_adapter_from_state_dict"):
        owner = base_owner(model)
        raise ValueError(
            f"hotswap_adapter is not supported: adapter {owner!r} has changed the base of this "
            f"model. Call peft_model.load_adapter, or restore_peft_model(peft_model, {owner!r}) "
            "first"
        )


def _asks(function: str) -> bool:
    """Whether this function is among the callers.

    PEFT's functions take the state dict of the whole model, as everybody does who saves that. Only
    the name tells the two apart.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False
