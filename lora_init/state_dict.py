"""Training checkpoints: `LoraModel.state_dict()` is the adapter, and loading one is its inverse.

It holds A, B, A0, B0 (and magnitudes, biases, modules trained whole), never the base: small, free
of the base's tied tensors, and what Accelerate, transformers' Trainer and DistributedDataParallel
store by themselves. One more tensor names the method and the layers' scalings: under others, the
tensors mean something else. A checkpoint may come from another start (another seed, other
calibration data): the base follows, W - s B0 A0 being computed from the loaded initial factors.

What takes a model apart by its state dict and expects all of it is given the base model instead, as
in ``accelerate.cpu_offload(model.base_model)``.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.injection import Transaction
from lora_init.layers import LoraLayer, TrainedModule
from lora_init.weights.offload import FSDP1, is_flattened

PARTS = (
    "lora_A",
    "lora_B",
    "lora_bias",
    "lora_magnitude_vector",
    "initial_lora_A",
    "initial_lora_B",
)
HIDDEN = (FSDP1, "_checkpoint_wrapped_module")
"""Parts of modules' names that are in no state dict: FSDP1 and activation checkpointing hide them;
torch.compile, whose wrapper is "_orig_mod", does not."""
WRAPPERS = (*HIDDEN, "_orig_mod", "module")
"""Parts of names that depend on what a model is wrapped in, DistributedDataParallel included."""


START = "_extra_state"
"""The key of the start's identification, which torch knows as a module's extra state."""
NAME_BYTES = 32


def start_of(model: nn.Module) -> Tensor:
    """The method and the layers' scalings as bytes: equal for runs that may load each other's.

    A tensor, since safetensors stores nothing else; and on the CPU, of a length that the layers
    alone decide, so that torch.distributed.checkpoint can load it in place.
    """
    name = model.plan.initializer.name.encode()
    if len(name) > NAME_BYTES:
        name = hashlib.sha256(name).hexdigest()[:NAME_BYTES].encode()
    scalings = [model.layers[layer].scaling for layer in sorted(model.layers)]
    content = name.ljust(NAME_BYTES, b"\0") + struct.pack(f"<{len(scalings)}d", *scalings)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _refuse_other_start(model: nn.Module, start: Tensor | None, state: dict[str, Tensor]) -> None:
    """Refuse a checkpoint whose tensors mean something else in this model.

    Args:
        start: of the checkpoint; None in one of a former version.
        state: the adapter's tensors in the checkpoint, by their names in this model.

    Raises:
        ValueError: its method or the scaling of a layer is another one.
    """
    if start is None:
        _refuse_other_zeros(model, state)
        return
    own = start_of(model)
    if start.dtype != own.dtype or start.shape != own.shape:
        raise ValueError(
            f"checkpoint: {START!r} has dtype {start.dtype} and shape {tuple(start.shape)}, this "
            f"model {own.dtype} and {tuple(own.shape)}; it is another run's, or damaged"
        )
    given, expected = bytes(start.cpu().tolist()), bytes(own.tolist())
    names = [content[:NAME_BYTES].rstrip(b"\0") for content in (given, expected)]
    if names[0] != names[1]:
        found, wanted = (name.decode(errors="replace") for name in names)
        raise ValueError(
            f"checkpoint: it is of init_lora_weights={found!r}, this model of {wanted!r}; "
            f"initialize with {found!r} first (lora_init.reinitialize starts a model again)"
        )
    if given != expected:
        count = len(model.layers)
        scalings = [struct.unpack(f"<{count}d", one[NAME_BYTES:]) for one in (given, expected)]
        for layer, found, wanted in zip(sorted(model.layers), *scalings, strict=True):
            if found != wanted:
                raise ValueError(
                    f"checkpoint: the scaling of {layer!r} is {found:g}, in this model {wanted:g}; "
                    "initialize with the checkpoint's r, lora_alpha, alpha_pattern and use_rslora"
                )


def _refuse_other_zeros(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Refuse a checkpoint without identification that is certainly of another method.

    Methods that keep the base may start at B = 0, in every layer. One that subtracts does not.
    """
    own = [layer.initial_lora_B for layer in model.layers.values()]
    given = [value for name, value in state.items() if name.endswith("initial_lora_B")]
    if not given or any(value is None for value in own):
        return
    starts_at_zero = [not any(bool(value.any()) for value in values) for values in (own, given)]
    if starts_at_zero[0] != starts_at_zero[1]:
        kind = ["another B", "B = 0"]
        raise ValueError(
            f"checkpoint: its layers started at {kind[starts_at_zero[1]]}, this model's at "
            f"{kind[starts_at_zero[0]]}: it is of another init_lora_weights than "
            f"{model.plan.initializer.name!r}; initialize with the checkpoint's method first"
        )


def register(model: nn.Module) -> None:
    """Hook a LoraModel's state dict; works inside other modules too."""
    model.register_state_dict_pre_hook(_refuse_fsdp1)
    model.register_state_dict_post_hook(_keep_adapter_only)
    model.register_load_state_dict_pre_hook(_check_and_settle)
    model.register_load_state_dict_post_hook(_after_loading)


def adapter_keys(model: nn.Module) -> list[str]:
    """The names of the adapter's tensors in the model's state dict; none once it is unloaded."""
    keys = []
    for name, module in model.named_modules():
        name = _without(HIDDEN, name)
        if isinstance(module, LoraLayer):
            keys += [f"{name}.{part}" for part in PARTS if getattr(module, part) is not None]
        elif isinstance(module, TrainedModule):
            inside = module.trained_module.state_dict()
            keys += [f"{name}.trained_module.{key}" for key in inside]
    # By name: sharding puts new parameters in the places of the old.
    around = (*HIDDEN, "_orig_mod", "base_layer")
    biases = {_without(around, f"base_model.{name}") for name in model.trained_biases()}
    for name, _ in model.named_parameters():
        if _without(around, name) in biases:
            keys.append(_without(HIDDEN, name))
    return keys


def _without(wrappers: tuple[str, ...], name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _rename(state: dict[str, Tensor], prefix: str, wanted: list[str]) -> None:
    """Give a checkpoint of a model in other wrappers the names that this model has.

    A name is changed only where this model lacks it, and lacks another that is equal without its
    wrappers: a module of a user may be called "module", too.
    """
    missing = {_without(WRAPPERS, name): name for name in wanted if prefix + name not in state}
    for key in [key for key in state if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if name not in wanted and (own := missing.pop(_without(WRAPPERS, name), None)) is not None:
            state[prefix + own] = state.pop(key)


def _refuse_fsdp1(model: nn.Module, prefix: str, *_: Any) -> None:
    """Refuse what FullyShardedDataParallel asks: it wants every tensor that it has flattened.

    Raises:
        NotImplementedError: it is wrapped around the model, and its parameters are not whole.
    """
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    if FSDP1 in prefix or any(is_flattened(layer.lora_A) for layer in layers):
        raise NotImplementedError(
            "the state dict of a LoraModel inside FullyShardedDataParallel is not served, because "
            "it holds the adapter only; take it with `FullyShardedDataParallel.summon_full_params("
            "wrapped): wrapped.module.state_dict()`, or shard with torch's fully_shard"
        )


def _keep_adapter_only(
    model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    model.undo_broken_loading()
    wanted = {prefix + key for key in adapter_keys(model)}
    if not wanted:
        state.pop(prefix + START, None)
        return  # unloaded: a plain model's state
    if model.trained_biases():  # which hold other values while the adapter is off or merged
        model.refuse_in_between("state_dict")
    for key in [key for key in state if key.startswith(prefix) and key not in wanted]:
        if key != prefix + START:
            del state[key]


def _check_and_settle(
    model: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Refuse another run's checkpoint before anything is changed; then let the base follow it.

    Raises:
        ValueError: a tensor is missing, surplus, mis-shaped or not finite; or other initial factors
            on a base that was replaced by a quantised one.
        RuntimeError: the adapter is merged or disabled at the moment.
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
            "load_state_dict(assign=True) would exchange the trained biases of the base, and their "
            "originals would not be put back; leave assign out"
        )
    _rename(state, prefix, [*wanted, START])
    start = state.pop(prefix + START, None)
    own = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    own = {_without(HIDDEN, name): value for name, value in own.items()}
    # torch.distributed.checkpoint fills in what is missing with the model's own tensors.
    given = {
        key[len(prefix) :]
        for key, value in state.items()
        if key.startswith(prefix)
        and (key[len(prefix) :] in wanted or value is not own.get(key[len(prefix) :]))
    }
    if not given:
        raise ValueError(
            f"checkpoint: no name in it begins with {prefix!r}; load it into the LoraModel itself, "
            "which torch.compile keeps as model._orig_mod and DistributedDataParallel as "
            "model.module"
        )
    for name in [*(key for key in wanted if key not in given), *sorted(given - set(wanted))]:
        where = "this model" if name in wanted else "the checkpoint"
        raise ValueError(f"checkpoint: {name!r} is only in {where}; it is another run's")
    for name in wanted:
        value = state[prefix + name]
        if value.shape != own[name].shape:
            raise ValueError(
                f"checkpoint: {name!r} has shape {tuple(value.shape)}, this model "
                f"{tuple(own[name].shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"checkpoint: {name!r} holds NaN or infinite values")
    start = start if isinstance(start, Tensor) else None  # torch has a stand-in for a missing one
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
                f"checkpoint: '{name}.initial_lora_A' differs from this model's initial factor, "
                "and its quantised base belongs to that; initialize with the same method, seed "
                "and calibration data first"
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


def _after_loading(model: nn.Module, incompatible: Any) -> None:
    """The base is not in a checkpoint, so nothing of it is missing.

    Neither is the start's identification, which was looked at before and is not in former ones.
    """
    missing = incompatible.missing_keys
    start = model.checkpoint_prefix + START
    if adapter_keys(model):
        # The list is the whole tree's: another module's missing keys stay.
        base = f"{model.checkpoint_prefix}base_model."
        missing[:] = [key for key in missing if not key.startswith(base)]
    missing[:] = [key for key in missing if key != start]
    model.loading = None  # the last statement: the checkpoint is loaded
