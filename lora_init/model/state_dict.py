"""Save and load training checkpoints: `LoraModel.state_dict()` contains the adapter only.

The state dict holds A, B, a core R, the initial factors A0 and B0, magnitudes, biases and fully
trained modules. It never holds base weights, so it is small and has no tied tensors. Accelerate,
transformers' Trainer and DistributedDataParallel store it without special support. One more tensor
identifies the method and the scalings of the layers, which must match when a checkpoint is loaded.

A checkpoint may come from another seed or other calibration data. Loading it then updates edited
base weights to W - s B0 A0 with the loaded initial factors.

Tools that need the full state dict must get the base model, as in
``accelerate.cpu_offload(model.base_model)``.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_init.injection import Transaction
from lora_init.layers import LoraLayer, TrainedModule
from lora_init.weights.offload import FSDP1, is_flattened

if TYPE_CHECKING:
    from lora_init.model.lora_model import LoraModel

PARTS = (
    "lora_A",
    "lora_B",
    "lora_core",
    "lora_bias",
    "lora_magnitude_vector",
    "initial_lora_A",
    "initial_lora_B",
)
HIDDEN = (FSDP1, "_checkpoint_wrapped_module")
"""Parts of module names that FSDP1 and activation checkpointing remove from state dicts.
torch.compile keeps its part, "_orig_mod"."""
WRAPPERS = (*HIDDEN, "_orig_mod", "module")
"""Parts of names that any wrapper adds, including DistributedDataParallel."""

START = "_extra_state"
"""The key of the tensor that identifies the method: the module's extra state in torch."""
NAME_BYTES = 32


def start_of(model: LoraModel) -> Tensor:
    """Encode the method and the layers' scalings as bytes; compatible runs have equal bytes.

    The result is a tensor, since safetensors stores tensors only. Its length depends on the number
    of layers only, so torch.distributed.checkpoint can load it in place.
    """
    name = model.plan.initializer.name.encode()
    if len(name) > NAME_BYTES:
        name = hashlib.sha256(name).hexdigest()[:NAME_BYTES].encode()
    scalings = [model.layers[layer].scaling for layer in sorted(model.layers)]
    content = name.ljust(NAME_BYTES, b"\0") + struct.pack(f"<{len(scalings)}d", *scalings)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _refuse_other_start(model: LoraModel, start: Tensor | None, state: dict[str, Tensor]) -> None:
    """Raise if a checkpoint belongs to another method or to other scalings.

    Args:
        model: the LoraModel that loads the checkpoint.
        start: the result of `start_of` in the checkpoint; None in checkpoints of older versions.
        state: the adapter's tensors in the checkpoint, by their names in this model.

    Raises:
        ValueError: the method or the scaling of a layer differs.
    """
    if start is None:
        _refuse_other_zeros(model, state)
        return
    own = start_of(model)
    if start.dtype != own.dtype or start.shape != own.shape:
        raise ValueError(
            f"checkpoint: {START!r} has dtype {start.dtype} and shape {tuple(start.shape)}; they "
            f"must be {own.dtype} and {tuple(own.shape)}. It is from another run, or damaged."
        )
    given, expected = bytes(start.cpu().tolist()), bytes(own.tolist())
    names = [content[:NAME_BYTES].rstrip(b"\0") for content in (given, expected)]
    if names[0] != names[1]:
        found, wanted = (name.decode(errors="replace") for name in names)
        raise ValueError(
            f"checkpoint: init_lora_weights={found!r} is not supported in this model: must be "
            f"{wanted!r}. Initialize with {found!r} first (see lora_init.reinitialize)."
        )
    if given != expected:
        count = len(model.layers)
        scalings = [struct.unpack(f"<{count}d", one[NAME_BYTES:]) for one in (given, expected)]
        for layer, found, wanted in zip(sorted(model.layers), *scalings, strict=True):
            if found != wanted:
                raise ValueError(
                    f"checkpoint: the scaling of {layer!r} is {found:g}: must be {wanted:g}. "
                    "Initialize with the checkpoint's r, lora_alpha, alpha_pattern and use_rslora."
                )


def _refuse_other_zeros(model: LoraModel, state: dict[str, Tensor]) -> None:
    """Raise if a checkpoint without identification certainly belongs to another method.

    Methods that keep the base may initialize B to zero in all layers. Methods that subtract from
    the base do not.
    """
    own = [layer.initial_lora_B for layer in model.layers.values()]
    given = [value for name, value in state.items() if name.endswith("initial_lora_B")]
    if not given or any(value is None for value in own):
        return
    starts_at_zero = [not any(bool(value.any()) for value in values) for values in (own, given)]
    if starts_at_zero[0] != starts_at_zero[1]:
        kind = ["nonzero", "zero"]
        raise ValueError(
            f"checkpoint: the initial B is {kind[starts_at_zero[1]]}: must be "
            f"{kind[starts_at_zero[0]]} for init_lora_weights={model.plan.initializer.name!r}. "
            "Initialize with the checkpoint's method first."
        )


def register(model: LoraModel) -> None:
    """Register the state dict hooks of a LoraModel; they also work inside other modules."""
    model.register_state_dict_pre_hook(_refuse_fsdp1)
    model.register_state_dict_post_hook(_keep_adapter_only)
    model.register_load_state_dict_pre_hook(_check_and_prepare)
    model.register_load_state_dict_post_hook(_after_loading)


def adapter_keys(model: LoraModel) -> list[str]:
    """The names of the adapter's tensors in the state dict; empty after `unload`."""
    keys = []
    for name, module in model.named_modules():
        name = _without(HIDDEN, name)
        if isinstance(module, LoraLayer):
            keys += [f"{name}.{part}" for part in PARTS if getattr(module, part) is not None]
        elif isinstance(module, TrainedModule):
            inside = module.trained_module.state_dict()
            keys += [f"{name}.trained_module.{key}" for key in inside]
    # Compare by name: sharding replaces the parameters.
    around = (*HIDDEN, "_orig_mod", "base_layer")
    biases = {_without(around, f"base_model.{name}") for name in model.trained_biases()}
    for name, _ in model.named_parameters():
        if _without(around, name) in biases:
            keys.append(_without(HIDDEN, name))
    return keys


def _without(wrappers: tuple[str, ...], name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _rename(state: dict[str, Tensor], prefix: str, wanted: list[str]) -> None:
    """Rename the keys of a checkpoint whose model had other wrappers.

    A key is renamed only if this model lacks it and the checkpoint lacks the new name, since a
    user's module may also be called "module".
    """
    missing = {_without(WRAPPERS, name): name for name in wanted if prefix + name not in state}
    for key in [key for key in state if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if name not in wanted and (own := missing.pop(_without(WRAPPERS, name), None)) is not None:
            state[prefix + own] = state.pop(key)


def _refuse_fsdp1(model: LoraModel, prefix: str, *_: Any) -> None:
    """Raise inside FullyShardedDataParallel (FSDP1), which needs the complete state dict.

    Raises:
        NotImplementedError: FSDP1 wraps the model, and its parameters are flattened.
    """
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    if FSDP1 in prefix or any(is_flattened(layer.lora_A) for layer in layers):
        raise NotImplementedError(
            "the state dict of a LoraModel inside FullyShardedDataParallel is not supported, since "
            "it contains the adapter only. Call `wrapped.module.state_dict()` inside "
            "`FullyShardedDataParallel.summon_full_params(wrapped)`, or use torch's fully_shard."
        )


def _refuse_ignored_frozen() -> None:
    """Raise if torch will remove the frozen parameters, and fail at the first that is not there.

    Raises:
        ValueError: `StateDictOptions(ignore_frozen_params=True)`. A caller's frame shows it.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_get_model_state_dict":
        frame = frame.f_back
    if frame is not None and getattr(frame.f_locals.get("info"), "ignore_frozen_params", False):
        raise ValueError(
            "ignore_frozen_params=True is not supported: must be False, because the state dict of "
            "a LoraModel has no frozen base weights that torch could remove. Leave it out."
        )


def _keep_adapter_only(
    model: LoraModel, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    _refuse_ignored_frozen()
    model.undo_broken_loading()
    wanted = {prefix + key for key in adapter_keys(model)}
    if not wanted:
        state.pop(prefix + START, None)
        return  # unloaded: the state dict of a plain model
    if model.trained_biases():  # their values differ while the adapter is disabled or merged
        model.refuse_in_between("state_dict")
    for key in [key for key in state if key.startswith(prefix) and key not in wanted]:
        if key != prefix + START:
            del state[key]


def _check_and_prepare(
    model: LoraModel,
    state: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Check a checkpoint before anything changes, then update the base to its initial factors.

    Raises:
        ValueError: a tensor is missing, unknown, not finite or has a wrong shape; or the initial
            factors differ and the base was replaced by a quantized one.
        RuntimeError: the adapter is merged or disabled.
    """
    _refuse_fsdp1(model, prefix)
    model.undo_broken_loading()
    wanted = adapter_keys(model)
    model.checkpoint_prefix = prefix
    if not wanted:
        return
    model.refuse_in_between("load_state_dict")
    if metadata.get("assign_to_params_buffers") and model.trained_biases():
        raise ValueError(
            f"assign=True is not supported with bias={model.plan.bias!r}: must be False, since the "
            "original biases could not be restored. Leave out assign."
        )
    _rename(state, prefix, [*wanted, START])
    start = state.pop(prefix + START, None)
    own = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    own = {_without(HIDDEN, name): value for name, value in own.items()}
    # torch.distributed.checkpoint replaces missing tensors with those of the model.
    given = {
        key[len(prefix) :]
        for key, value in state.items()
        if key.startswith(prefix)
        and (key[len(prefix) :] in wanted or value is not own.get(key[len(prefix) :]))
    }
    if not given:
        raise ValueError(
            f"checkpoint: no name begins with {prefix!r}. Load it into the LoraModel itself, which "
            "is model._orig_mod under torch.compile and model.module under DistributedDataParallel."
        )
    for name in [*(key for key in wanted if key not in given), *sorted(given - set(wanted))]:
        where = "this model" if name in wanted else "the checkpoint"
        raise ValueError(
            f"checkpoint: {name!r} is only in {where}. Load a checkpoint of the same model and "
            "LoraConfig."
        )
    for name in wanted:
        value = state[prefix + name]
        if value.shape != own[name].shape:
            raise ValueError(
                f"checkpoint: {name!r} has shape {tuple(value.shape)}: must be "
                f"{tuple(own[name].shape)}. Load a checkpoint of the same model and LoraConfig."
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"checkpoint: {name!r} contains NaN or infinite values")
    start = start if isinstance(start, Tensor) else None  # torch's placeholder for a missing one
    _refuse_other_start(model, start, {name: state[prefix + name] for name in wanted})
    moved = {}
    names = {id(layer): name for name, layer in model.layers.items()}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or module.initial_lora_A is None:
            continue
        name = _without(HIDDEN, name)
        initial = [state[f"{prefix}{name}.initial_lora_{factor}"] for factor in "AB"]
        initial = [value.to(module.initial_lora_A) for value in initial]
        same = torch.equal(initial[0], module.initial_lora_A) and torch.equal(
            initial[1], module.initial_lora_B
        )
        if same:
            continue
        if module.base_state == "replaced":
            raise ValueError(
                f"checkpoint: '{name}.initial_lora_A' differs from this model's, whose quantized "
                "base depends on it. Initialize with the same method, seed and calibration data "
                "first."
            )
        moved[names[id(module)]] = initial
    transaction = Transaction()
    owners = {
        _without(HIDDEN, name): module
        for name, module in model.named_modules(remove_duplicate=False)
    }
    for name in wanted:
        owner, _, own_name = name.rpartition(".")
        transaction.values(owners[owner], own_name)
    model.loading = transaction
    for name, (initial_A, initial_B) in moved.items():
        model.move_initial_factors(name, initial_A, initial_B, transaction)


def _after_loading(model: LoraModel, incompatible: Any) -> None:
    """Remove keys from the list of missing ones that a checkpoint never or not always has.

    These are the base weights, and the identification of the method, which was checked before.
    """
    missing = incompatible.missing_keys
    start = model.checkpoint_prefix + START
    if adapter_keys(model):
        # The list covers all modules of the model; keep the missing keys of the others.
        base = f"{model.checkpoint_prefix}base_model."
        missing[:] = [key for key in missing if not key.startswith(base)]
    missing[:] = [key for key in missing if key != start]
    model.loading = None  # must be the last statement: now the checkpoint is loaded
