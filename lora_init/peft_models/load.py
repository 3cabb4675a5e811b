"""Loading adapter files into a PEFT model whose base was changed; `save` describes the files."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from lora_init import adapters
from lora_init.adapters.format import (
    HEADER_KEY,
    OWN_WEIGHTS_NAME,
    PREFIX,
    WEIGHTS_NAME,
    part_key,
)
from lora_init.adapters.loaded import LoadedAdapter
from lora_init.factors import Factors
from lora_init.injection import Transaction, atomically
from lora_init.peft_models.apply import apply, begin, drop_layer, set_config
from lora_init.peft_models.changes import Data, Operation
from lora_init.peft_models.guards import guard
from lora_init.peft_models.holder import checked_holder, is_peft_model, plain_base, refuse_merged
from lora_init.peft_models.injected import own_peft_config
from lora_init.peft_models.layers import AXES, AdaptedLayer, adapted_layers
from lora_init.peft_models.plan import adapter_dtype, refuse_foreign_start
from lora_init.peft_models.start import base_owner, record, records
from lora_init.peft_models.state_dict import AnotherStart
from lora_init.peft_models.subtraction import check_subtraction
from lora_init.plan.plan import Plan
from lora_init.weights.sharded import is_sharded


def load_peft_checkpoint(
    peft_model: nn.Module,
    folder: str | PathLike[str],
    adapter_name: str = "default",
    *,
    original_weights: str | PathLike[str] | Mapping[str, Tensor] | None = None,
    keep_original: bool = True,
) -> None:
    """Load an adapter for further training: ranks, base, A0 and B0 become what they were.

    In a new process: make the same PEFT model on the original base, load the checkpoint that
    Trainer wrote, and let Trainer resume. No calibration data is needed.

        peft_model = peft.get_peft_model(base, config)
        load_peft_checkpoint(peft_model, "run/checkpoint-500")
        Trainer(peft_model, …).train(resume_from_checkpoint="run/checkpoint-500")

    The present adapter is replaced, and its initialization is undone first.

    Args:
        folder: what `save_pretrained` of an initialized model, or Trainer, wrote. An adapter that
            is not called "default" has its own folder. Also a plain adapter of PEFT (kept base),
            whose ranks are then used.
        original_weights, keep_original: as of `initialize_peft_model`.

    Raises:
        FileNotFoundError, ValueError: no adapter, a damaged one, or another model's, by name; the
            model is unchanged then.
    """
    peft_model = checked_holder(peft_model, adapter_name)
    refuse_merged(peft_model, "load_peft_checkpoint")
    refuse_foreign_start(peft_model, adapter_name)
    atomically(
        partial(
            _load, peft_model, Path(folder), adapter_name, original_weights, keep_original
        )
    )  # fmt: skip


def _load(
    peft_model: Any,
    folder: Path,
    adapter_name: str,
    original_weights: Any,
    keep_original: bool,
    transaction: Transaction,
) -> None:
    operation = begin(peft_model, adapter_name, transaction)
    layers = {layer.name: layer for layer in adapted_layers(peft_model, adapter_name)}
    theirs = peft_model.peft_config[adapter_name]
    ranks = {name: (layer.rank, layer.alpha) for name, layer in layers.items()}
    with plain_base(peft_model, transaction) as base:
        operation.keep_plain(base)
        loaded = adapters.read(folder, base, adapter_dtype(list(layers.values())), original_weights)
        plan, config = loaded.plan, loaded.config
        if plan.initializer.has_core:
            raise ValueError(
                f"{folder}: {plan.initializer.name} trains a core between A and B, which PEFT's "
                "layers do not have. Load it with LoraModel.from_pretrained; PEFT's own "
                "PeftModel.from_pretrained loads it as a plain adapter"
            )
        _refuse_other_model(folder, layers, loaded, theirs)
        for target in plan.targets:
            check_subtraction(layers[target.name], target, plan)
        changed = plan.initializer.base != "keep"
        factors = {name: _initial_factors(made) for name, made in loaded.factors.items()}
        apply(layers, plan, factors, loaded.weights, operation, initial_known=changed)
    for name in layers.keys() - factors.keys():
        drop_layer(layers.pop(name), operation)
    if not is_peft_model(peft_model):
        own_peft_config(peft_model, adapter_name, operation)
        theirs = peft_model.peft_config[adapter_name]
    if ranks != {target.name: (target.rank, target.alpha) for target in plan.targets}:
        set_config(theirs, config, plan, operation)
    record(peft_model, adapter_name, config, plan, operation)
    for name, expected in loaded.checksums.items():
        start = layers[name].start
        if start is None or start.checksum != expected:
            warnings.warn(
                f"the quantized base of {name!r} differs in some codes from the one the adapter "
                "was trained on (another machine's arithmetic); outputs may move by one "
                "quantization step in few weights",
                stacklevel=5,
            )
    guard(peft_model, list(layers.values()), operation, load_adapter)
    _fill(peft_model, folder, adapter_name, operation, is_trainable=True)
    if not keep_original:
        operation.changes.drop_weights()


def load_adapter(
    peft_model: Any,
    model_id: str | PathLike[str],
    adapter_name: str,
    is_trainable: bool = False,
    **settings: Any,
) -> Any:
    """PEFT's `load_adapter` on a changed base: files for the original base are split.

    Raises:
        ValueError: a file that cannot be right on this base; nothing is changed then.
    """
    refuse_merged(peft_model, "load_adapter")
    folder, owner = Path(model_id), base_owner(peft_model) or adapter_name
    method = records(peft_model)[owner].plan.initializer.name
    if not has_header(folder) or adapter_name not in peft_model.peft_config:
        raise ValueError(
            f"load_adapter({str(model_id)!r}, {adapter_name!r}) is not supported: {method} has "
            "changed the base of this model, and the adapter is for the original one. Call "
            f"restore_peft_model(peft_model, {owner!r}) first"
        )
    try:
        result = atomically(
            lambda transaction: _fill(
                peft_model,
                folder,
                adapter_name,
                Operation(transaction),
                is_trainable=is_trainable,
                **settings,
            )
        )
    except AnotherStart:
        if adapter_name != owner:
            raise
        load_peft_checkpoint(peft_model, folder, adapter_name)
        result = _IncompatibleKeys([], [])
    if not is_trainable:
        peft_model.eval()
    return result


def _initial_factors(factors: Factors) -> Factors:
    """The factors at the start.

    A file with a replaced base holds the trained factors, and those that its base was made by.
    The latter are A0, B0, except for loftq's, whose last step is not needed to make the base.
    """
    made = factors.replacement
    if made is None:
        return factors
    dtype = factors.lora_A.dtype
    return dataclasses.replace(factors, lora_A=made.lora_A.to(dtype), lora_B=made.lora_B.to(dtype))


def _refuse_other_model(
    folder: Path, layers: Mapping[str, AdaptedLayer], loaded: LoadedAdapter, theirs: Any
) -> None:
    for target in loaded.plan.targets:
        if target.name not in layers:
            raise ValueError(
                f"{str(folder)!r} adapts {target.name!r}, which this PEFT model does not. Make it "
                "with the configuration of the training"
            )
    for name in ("use_dora", "use_rslora", "lora_bias", "bias"):
        if getattr(loaded.config, name) != getattr(theirs, name):
            raise ValueError(
                f"{str(folder)!r} was trained with {name}={getattr(loaded.config, name)!r}, but "
                f"this PEFT model has {getattr(theirs, name)!r}. Make it with the configuration of "
                "the training"
            )


def _fill(
    peft_model: Any, folder: Path, adapter_name: str, operation: Operation, **settings: Any
) -> Any:
    """Let PEFT load the trained values, from a file as it would have written it.

    PEFT's own loader knows about modules trained whole, biases and everything else in the file.
    The hook of `load_state_dict` splits factors of rank 2r. PEFT overwrites the present values in
    place, so parameters get copies of them first.
    """
    tensors = load_file(_weights_file(folder))
    has_biases = any(key.endswith(".bias") for key in tensors)
    for name, parameter in peft_model.named_parameters():
        if f".{adapter_name}." in f"{name}." or (name.endswith(".bias") and has_biases):
            operation.set(Data(parameter), parameter.data.clone())
            if is_sharded(parameter):  # a cast would replace what FSDP2 and the optimizer hold
                settings["autocast_adapter_dtype"] = False
    owner = base_owner(peft_model)
    if owner is not None:
        plan = records(peft_model)[owner].plan
        tensors = _as_pefts(tensors, plan, adapted_layers(peft_model, owner))
    if not is_peft_model(peft_model):
        own = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
        return sys.modules["peft"].set_peft_model_state_dict(peft_model, own, adapter_name)
    load = type(peft_model).load_adapter
    with tempfile.TemporaryDirectory() as plain:
        save_file(tensors, Path(plain) / WEIGHTS_NAME, metadata={"format": "pt"})
        return load(peft_model, plain, adapter_name, **settings)


def _as_pefts(
    tensors: dict[str, Tensor], plan: Plan, layers: list[AdaptedLayer]
) -> dict[str, Tensor]:
    """A file's tensors without the parts that only this package reads.

    A0 and B0 become parts of factors of rank 2r.

    Raises:
        AnotherStart: the file's replaced base is not that of the model.
    """
    by_name = {layer.name: layer for layer in layers}
    for target in plan.targets:
        layer = by_name[target.name]
        for which in AXES:
            made = tensors.pop(part_key(target, f"replacement_{which[-1]}"), None)
            initial = tensors.pop(part_key(target, f"initial_{which[-1]}"), None)
            present = getattr(layer.base_start.replacement, which, None)
            if not _is_same(made, present):
                raise AnotherStart(
                    f"the file's base of {target.name!r} is not the one that the adapter "
                    f"{layer.adapter!r} has made. Call load_peft_checkpoint(peft_model, folder)"
                )
            if initial is not None:
                initial = layer.stored(which, -initial if which == "lora_B" else initial)
                key = part_key(target, which)
                tensors[key] = layer.joined(which, tensors[key], initial)
    return tensors


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one.to(other), other)


def _weights_file(folder: Path) -> Path:
    own = folder / OWN_WEIGHTS_NAME
    return own if own.is_file() else folder / WEIGHTS_NAME


def has_header(folder: Path) -> bool:
    """Whether there is a file with our header; PEFT writes none."""
    path = _weights_file(folder)
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        return HEADER_KEY in (file.metadata() or {})
