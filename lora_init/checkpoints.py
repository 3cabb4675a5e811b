"""Training checkpoints: `LoraModel.state_dict()` is the adapter, and loading one is its inverse.

It holds A, B, A0, B0 (and magnitudes, biases, modules trained whole), never the base: small, free
of the base's tied tensors, and what Accelerate, transformers' Trainer and DistributedDataParallel
store without being told. A checkpoint may come from another start (another seed, other calibration
data): the base follows, W - s B0 A0 being made anew from the loaded initial factors.

What takes a model apart by its state dict and expects all of it is given the base model instead, as
in ``accelerate.cpu_offload(model.base_model)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_init.injection import Transaction
from lora_init.layers import LoraLayer, TrainedModule
from lora_init.presence import FSDP1, is_flattened

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
        return  # unloaded: a plain model's state
    if model.trained_biases():  # which hold other values while the adapter is off or merged
        model.refuse_in_between("state_dict")
    for key in [key for key in state if key.startswith(prefix) and key not in wanted]:
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
    """The base is not in a checkpoint, so nothing of it is missing."""
    if adapter_keys(model):
        # The list is the whole tree's: another module's missing keys stay.
        base = f"{model.checkpoint_prefix}base_model."
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not key.startswith(base)]
    model.loading = None  # the last statement: the checkpoint is loaded
