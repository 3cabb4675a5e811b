"""The state dict of a PEFT model whose base was changed: it describes the original base.

Whatever leaves the process by `state_dict()` is right there: `get_peft_model_state_dict`, which
trainers send to vLLM, and full checkpoints of Accelerate or torch. A and B are [A; A0] and
[B, -B0] of rank 2r, and an edited weight is the original one. `load_state_dict` splits them again.

A replaced base has no such form. Its full state dict needs no change: it holds the replaced
weights, A and B. The adapter alone is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_init.peft_models.holder import is_peft_model
from lora_init.peft_models.layers import AXES, AdaptedLayer, adapted_layers
from lora_init.peft_models.start import base_owner
from lora_init.weights.kinds import known_format
from lora_init.weights.sharded import local_part, split_as, whole

# FSDP, activation checkpointing and torch.compile add these to module names, not to keys.
WRAPPER_PREFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class AnotherStart(ValueError):
    """An adapter belongs to another start than the one that changed the base."""


@dataclass(frozen=True, eq=False)
class StateDictHooks:
    """Whether `state_dict` and `load_state_dict` of a PEFT model describe the original base."""

    model: Any

    def get(self) -> bool:
        return export in self.model._state_dict_hooks.values()

    def set(self, value: bool) -> None:
        exports, splits = self.model._state_dict_hooks, self.model._load_state_dict_pre_hooks
        for key in [key for key, hook in exports.items() if hook is export]:
            del exports[key]
        for key in [key for key, hook in splits.items() if hook.hook is split]:
            del splits[key]
        if value:
            self.model._register_state_dict_hook(export)
            self.model.register_load_state_dict_pre_hook(split)


def plain_state_dict(peft_model: Any) -> dict[str, Tensor]:
    """The state dict as the model stores it, by PEFT's own names.

    Without a PeftModel, a subtracting start has rank 2r in it already.
    """
    if not is_peft_model(peft_model):
        return dict(peft_model.state_dict())
    return dict(peft_model.base_model.state_dict(prefix="base_model."))


def layers_like(peft_model: Any, name: str, *, checked: bool = True) -> list[AdaptedLayer]:
    """The layers of an adapter, which must be those of the adapter that changed the base.

    Raises:
        ValueError: it has other layers, ranks or scalings.
    """
    owner = base_owner(peft_model)
    changed = adapted_layers(peft_model, owner or name, checked=checked)
    layers = adapted_layers(peft_model, name, checked=checked) if name != owner else changed
    wanted = [(layer.name, layer.rank, layer.scaling) for layer in changed]
    if [(layer.name, layer.rank, layer.scaling) for layer in layers] != wanted:
        raise ValueError(
            f"adapter {name!r} has other layers, ranks or scalings than {owner!r}, whose start has "
            "changed the base, so it cannot be written for the original base. Save "
            f"selected_adapters=[{owner!r}]"
        )
    return layers


def extend(state: dict[str, Tensor], path: str, layer: AdaptedLayer) -> None:
    """Make A and B of a layer [A; A0] and [B, -B0] in a state dict, if they are not yet."""
    for which, key, axis in factor_keys(path, layer):
        # A process that does not write gets an empty tensor, or no key.
        present = state.get(key)
        if present is None or present.numel() == 0 or present.shape[axis] != layer.width(which):
            continue
        own = whole(present)  # both factors are small
        initial = _initial(layer, which, own)
        state[key] = split_as(layer.joined(which, own, initial), present)


def shorten(state: dict[str, Tensor], path: str, layer: AdaptedLayer) -> None:
    """The inverse of `extend`, for a file that stores A0 and B0 under other names."""
    for which, key, axis in factor_keys(path, layer):
        present = state.get(key)
        if present is None or present.numel() == 0 or present.shape[axis] == layer.width(which):
            continue
        state[key] = layer.divided(which, present)[0]


def export(model: Any, state: dict[str, Tensor], prefix: str, _: dict[str, Any]) -> None:
    """A state-dict hook of a PEFT model: the state for the original base.

    Raises:
        ValueError: an adapter that has no form on the original base, or a caller that needs one.
    """
    owner = base_owner(model)
    if is_called_by("hotswap_adapter_from_state_dict"):
        raise ValueError(
            f"hotswap_adapter is not supported: adapter {owner!r} has changed the base of this "
            f"model. Call peft_model.load_adapter, or restore_peft_model(peft_model, {owner!r}) "
            "first"
        )
    for path, layer in _changed_layers(model):
        start = layer.base_start
        if start.replacement is not None:
            if is_called_by("get_peft_model_state_dict"):
                raise ValueError(
                    f"get_peft_model_state_dict is not supported: adapter {owner!r} has replaced "
                    "the base by a quantized one, and its A and B mean nothing on the original "
                    "base. Use lora_init.save_peft_model(model, folder), or merge it"
                )
            continue
        extend(state, prefix + path, layer)
        key = f"{prefix}{path}.base_layer.weight"
        if start.base == "edited" and key in state and not layer.module.merged:
            state[key] = _original_weight(layer, state[key])


def split(model: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A hook of `load_state_dict`: splits what `export` put together.

    Raises:
        ValueError: a state of another start; nothing is loaded then.
    """
    for path, layer in _changed_layers(model):
        if layer.base_start.replacement is not None:
            continue
        for which, key, axis in factor_keys(prefix + path, layer):
            value = state.get(key)
            if value is None or value.numel() == 0:
                continue
            wanted = 2 * layer.width(which)
            if value.shape[axis] != wanted:
                raise ValueError(
                    f"load_state_dict: {key!r} has rank {value.shape[axis]}, but must have rank "
                    f"{wanted}, that of this model's start on the original base. Load "
                    "what its state_dict() or save_pretrained() gave, or call restore_peft_model "
                    "first"
                )
            own, part = layer.divided(which, whole(value))
            if not torch.equal(part, _initial(layer, which, own)):
                raise AnotherStart(
                    f"load_state_dict: {key!r} belongs to another start than this model's. Call "
                    "load_peft_checkpoint(peft_model, folder) instead"
                )
            state[key] = split_as(own, layer.factor(which))
        key = f"{prefix}{path}.base_layer.weight"
        if layer.base_start.base == "edited" and key in state and not layer.module.merged:
            state[key] = _edited_weight(layer, state[key])


def _changed_layers(model: Any) -> Iterator[tuple[str, AdaptedLayer]]:
    """The layers of every adapter with their paths.

    Raises:
        ValueError: an adapter that has no form on the original base.
    """
    layers: list[AdaptedLayer] = []
    for name in model.peft_config:
        present = adapted_layers(model, name, checked=False)
        if any(hasattr(layer.base, layer.base_mark) for layer in present):
            layers += layers_like(model, name, checked=False)
    return with_paths(model, layers)


def with_paths(model: Any, layers: Iterable[AdaptedLayer]) -> Iterator[tuple[str, AdaptedLayer]]:
    """Layers with their paths, as the keys of a state dict begin."""
    paths = {id(module): path for path, module in model.named_modules()}
    for layer in layers:
        path = paths[id(layer.module)]
        for wrapper in WRAPPER_PREFIXES:
            path = path.replace(wrapper, "")
        yield path, layer


def factor_keys(path: str, layer: AdaptedLayer) -> Iterator[tuple[str, str, int]]:
    """The name, the key and the dimension of the rank of both factors."""
    suffix = "" if layer.is_embedding else ".weight"
    for which, axis in AXES.items():
        yield which, f"{path}.{layer.container(which)}.{layer.adapter}{suffix}", axis


def _initial(layer: AdaptedLayer, which: str, like: Tensor) -> Tensor:
    """A0 or -B0 in the layout of a state dict's factor."""
    lora_A, lora_B = layer.base_start.factors(layer.adapter)
    return layer.stored(which, lora_A if which == "lora_A" else -lora_B, like).to(like)


def _original_weight(layer: AdaptedLayer, weight: Tensor) -> Tensor:
    product = split_as(_stored_product(layer).to(weight.device), weight)
    return (weight + product).to(weight.dtype)


def _edited_weight(layer: AdaptedLayer, weight: Tensor) -> Tensor:
    present = layer.base.weight.detach()
    same = local_part(_original_weight(layer, present)), local_part(weight.to(present.dtype))
    if torch.equal(same[0], same[1].to(same[0].device)):
        return present  # exactly, without the rounding of a sum and a difference
    product = split_as(_stored_product(layer).to(weight.device), weight)
    return (weight - product).to(weight.dtype)


def _stored_product(layer: AdaptedLayer) -> Tensor:
    return known_format(layer.base).stored(layer.base, layer.base_start.product())


def is_called_by(function: str) -> bool:
    """Whether a function of this name is among the callers.

    PEFT's functions take the state dict of the whole model, as programs do that save the whole
    model. Only the name distinguishes them.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False
