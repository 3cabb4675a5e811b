"""A PEFT model that waits for the start in a checkpoint, before Trainer loads it.

Trainer loads a checkpoint before it calls a callback. Until then, the model waits:

- Trainer loads an adapter file by `load_adapter`. A file with a start restores that start.
- Under FSDP2, Trainer asks for the adapter's state dict, lets torch fill these tensors from the
  checkpoint, and loads them. After a subtracting start, the checkpoint holds [A; A0] and [B, -B0]
  of rank 2r. The waiting model gives [A; 0] and [B, 0], which torch can fill. What is loaded then
  contains A0 and B0. They become the model's start, without an initialization.

The functions replace methods by `functools.partial`, as `lora_init.peft_models.guards` does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lora_init.adapters.format import WEIGHTS_NAME
from lora_init.factors import Factors, block_matrix, matrix_blocks
from lora_init.injection import Transaction, atomically
from lora_init.peft_models.apply import apply, begin
from lora_init.peft_models.guards import guard
from lora_init.peft_models.holder import base_model, is_peft_model, plain_base
from lora_init.peft_models.injected import own_peft_config
from lora_init.peft_models.layers import AdaptedLayer, adapted_layers, refuse_sharded_layers
from lora_init.peft_models.load import has_header, load_adapter, load_peft_checkpoint
from lora_init.peft_models.plan import make_peft_plan, own_config
from lora_init.peft_models.start import base_owner, record
from lora_init.peft_models.state_dict import factor_keys, is_called_by, with_paths
from lora_init.weights.sharded import is_unit, split_as, whole
from lora_init.weights.source import BaseWeights

COLLECTORS = ("get_peft_model_state_dict", "get_model_state_dict")
"""The functions of PEFT, and of torch for a model that is not a PeftModel."""


@dataclass(frozen=True)
class Expected:
    """The start that a checkpoint is expected to contain.

    Attributes:
        method: as `LoraConfig.init_lora_weights`.
        subtracts: whether the method subtracts from the base.
        adapter: PEFT's adapter.
        quantized_base: as of `initialize_peft_model`.
    """

    method: Any
    subtracts: bool
    adapter: str = "default"
    quantized_base: str = "in_forward"


def wait(model: Any, expected: Expected) -> None:
    """Let a PEFT model restore the start of the checkpoint that is loaded next.

    A model whose base was changed has a start, and other checkpoints are refused there.
    """
    if base_owner(model) is not None:
        return
    stop_waiting(model)
    for name, function in WAITING.items():
        if name not in vars(model):
            setattr(model, name, partial(function, model, expected))


def stop_waiting(model: Any) -> None:
    """Take back what `wait` did."""
    for name, function in WAITING.items():
        if getattr(vars(model).get(name), "func", None) is function:
            delattr(model, name)


def load_file(
    model: Any, _: Expected, folder: Any, adapter_name: str, *args: Any, **settings: Any
) -> Any:
    """PEFT's `load_adapter`, for which a file with a start also restores that start."""
    stop_waiting(model)
    if adapter_name in model.peft_config and has_header(Path(folder)):
        load_peft_checkpoint(model, folder, adapter_name)
        return None
    return model.load_adapter(folder, adapter_name, *args, **settings)


def offered_state(model: Any, expected: Expected, *args: Any, **settings: Any) -> dict[str, Tensor]:
    """`state_dict`, with factors of rank 2r if PEFT or torch collects those of a sharded model.

    Between the sharding and the start of the training, that is only done to fill them.
    """
    state = type(model).state_dict(model, *args, **settings)
    if not (_expects_more(model, expected) and any(map(is_called_by, COLLECTORS))):
        return state
    for layer, which, key, _ in _factors(model, expected.adapter, state):
        own = whole(state[key])
        state[key] = split_as(layer.joined(which, own, torch.zeros_like(own)), state[key])
    return state


def load_state(
    model: Any, expected: Expected, state_dict: Mapping[str, Tensor], *args: Any, **settings: Any
) -> Any:
    """`load_state_dict`, which restores a start if the factors have rank 2r."""
    if _expects_more(model, expected):
        found = list(_factors(model, expected.adapter, state_dict))
        doubled = [
            state_dict[key].shape[axis] == 2 * layer.width(w) for layer, w, key, axis in found
        ]
        if doubled and all(doubled):
            parts: dict[str, dict[str, Tensor]] = {}
            for layer, which, key, _ in found:
                part = layer.divided(which, whole(state_dict[key]))[1]
                parts.setdefault(layer.name, {})[which] = _matrix(layer, which, part)
            starts = {name: Factors(one["lora_A"], -one["lora_B"]) for name, one in parts.items()}
            # torch has filled the adapter's biases in place, and a start sets them to zero.
            state_dict = {
                key: value.clone() if f".{expected.adapter}." in key else value
                for key, value in state_dict.items()
            }
            stop_waiting(model)
            atomically(partial(_restore, model, expected, starts))
    return type(model).load_state_dict(model, state_dict, *args, **settings)


def is_doubled_in_shards(model: Any, subtracts: bool = False) -> bool:
    """Whether FSDP2 shards the model, and its state dict has factors of rank 2r.

    Args:
        subtracts: whether a method that subtracts will initialize it.
    """
    return is_unit(model) and (subtracts or base_owner(model) is not None)


def has_all_factors(model: Any, folder: Path, adapter: str) -> bool:
    """Whether an adapter file contains the factors of all layers and the start."""
    if not has_header(folder) or not (folder / WEIGHTS_NAME).is_file():
        return False
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        factors = [key for key in file.keys() if ".lora_" in key]  # noqa: SIM118
    return len(factors) >= 2 * len(adapted_layers(model, adapter, checked=False))


def refuse_lost_adapter(model: Any, adapter: str) -> None:
    """Refuse a sharded model of whose adapter PEFT would save nothing, and load nothing.

    Raises:
        ValueError: `activation_checkpointing` of FSDP renames the modules, and PEFT 0.21 looks for
            tensors by these names.
    """
    if not is_unit(model) or adapter not in getattr(model, "peft_config", ()):
        return
    if not sys.modules["peft"].get_peft_model_state_dict(model, adapter_name=adapter):
        raise ValueError(
            "activation_checkpointing=True in fsdp_config is not supported with this version of "
            "PEFT: its files would contain no factors. Set activation_checkpointing (or "
            "gradient_checkpointing) of TrainingArguments instead"
        )


WAITING = {"load_adapter": load_file, "state_dict": offered_state, "load_state_dict": load_state}
"""The methods of a waiting model."""


def _expects_more(model: Any, expected: Expected) -> bool:
    """Whether a sharded model has no start, and the checkpoint has factors of rank 2r."""
    return expected.subtracts and is_unit(model) and base_owner(model) is None


def _factors(
    model: Any, adapter: str, state: Mapping[str, Tensor]
) -> Iterator[tuple[AdaptedLayer, str, str, int]]:
    """The factors in a state dict: layer, name, key, and the dimension of the rank."""
    for path, layer in with_paths(model, adapted_layers(model, adapter, checked=False)):
        for which, key, axis in factor_keys(path, layer):
            if key in state:
                yield layer, which, key, axis


def _matrix(layer: AdaptedLayer, which: str, stored: Tensor) -> Tensor:
    """The inverse of `AdaptedLayer.stored`, of one matrix."""
    form = matrix_blocks if which == "lora_A" else block_matrix
    return form(stored.flatten(1), layer.groups)


def _restore(
    model: Any, expected: Expected, starts: Mapping[str, Factors], transaction: Transaction
) -> None:
    """Make the start of a model from known initial factors."""
    operation = begin(model, expected.adapter, transaction)
    layers = adapted_layers(model, expected.adapter)
    refuse_sharded_layers(base_model(model), layers)
    config = own_config(model, layers, expected.method)
    plan = make_peft_plan(model, layers, config, expected.quantized_base, None, transaction)
    with plain_base(model, transaction) as base:
        operation.keep_plain(base)
        weights = BaseWeights(base, None)
        apply({layer.name: layer for layer in layers}, plan, starts, weights, operation)
    if not is_peft_model(model):
        own_peft_config(model, expected.adapter, operation)
    record(model, expected.adapter, config, plan, operation)
    guard(model, layers, operation, load_adapter)
