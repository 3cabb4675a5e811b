"""Adapter files of a PEFT model whose base was changed, read back; `saving` says what they are."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Mapping
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
    WEIGHTS_NAME,
    part_key,
)
from lora_init.factors import Factors
from lora_init.peft_models.apply import apply, check_subtraction, drop_layer, set_config
from lora_init.peft_models.changes import Journal, SetData, SetItem, keep_plain
from lora_init.peft_models.guards import guard
from lora_init.peft_models.layers import (
    AdaptedLayer,
    adapted_layers,
    check_peft_model,
    plain_base,
    refuse_merged,
)
from lora_init.peft_models.operation import attempt
from lora_init.peft_models.plan import adapter_dtype, refuse_strange_start
from lora_init.peft_models.start import Record, Start, base_owner, records
from lora_init.plan.plan import Target


def load_peft_checkpoint(
    peft_model: nn.Module,
    folder: str | PathLike,
    adapter_name: str = "default",
    *,
    original_weights: str | PathLike | Mapping[str, Tensor] | None = None,
    keep_original: bool = True,
) -> None:
    """Load an adapter for further training: ranks, base, A0 and B0 become what they were.

    For a new process: make the same PEFT model on the original base, load the checkpoint that
    Trainer wrote, and let Trainer resume. No calibration data is needed.

        peft_model = peft.get_peft_model(base, config)
        load_peft_checkpoint(peft_model, "run/checkpoint-500")
        Trainer(peft_model, …).train(resume_from_checkpoint="run/checkpoint-500")

    The adapter that the model has is given up; a former initialization of it is taken back first.

    Args:
        folder: what `save_pretrained` of an initialized model, or Trainer, wrote; of an adapter
            that is not called "default", its own folder. Also a plain adapter of PEFT (kept
            base), whose ranks are then taken over.
        original_weights, keep_original: as of `initialize_peft_model`.

    Raises:
        FileNotFoundError, ValueError: no, a damaged, or another model's adapter, by name; the model
            is unchanged then.
    """
    check_peft_model(peft_model, adapter_name)
    refuse_merged(peft_model, "load_peft_checkpoint")
    refuse_strange_start(peft_model, adapter_name)

    def start(done: Journal, wrappers: Journal) -> None:
        _load(peft_model, Path(folder), adapter_name, original_weights, done, wrappers)
        if not keep_original:
            records(peft_model)[adapter_name].changes = done.without_weights()

    attempt(peft_model, adapter_name, start)


def _load(
    peft_model: nn.Module,
    folder: Path,
    adapter_name: str,
    original_weights: Any,
    done: Journal,
    wrappers: Journal,
) -> None:
    layers = {layer.name: layer for layer in adapted_layers(peft_model, adapter_name)}
    theirs = peft_model.peft_config[adapter_name]
    with plain_base(peft_model, wrappers) as base:
        for change in keep_plain(base):
            done.do(change)
        loaded = adapters.read(folder, base, adapter_dtype(list(layers.values())), original_weights)
        plan, config = loaded.plan, loaded.config
        _refuse_other_model(folder, layers, plan, config, theirs)
        for target in plan.targets:
            check_subtraction(layers[target.name], target, plan)
        changed = plan.initializer.base != "keep"
        moved = {name: (layer.rank, layer.alpha) for name, layer in layers.items()} != {
            target.name: (target.rank, target.alpha) for target in plan.targets
        }
        factors = {name: _start_of(made) for name, made in loaded.factors.items()}
        apply(layers, plan, factors, loaded.weights, done, initial_known=changed)
    names = {target.name for target in plan.targets}
    for name in layers.keys() - names:
        drop_layer(layers[name], done)
    if moved:
        set_config(theirs, config, plan, done)
    record = Record(plan.explicit(config), plan, done)
    done.do(SetItem(records(peft_model), adapter_name, record))
    for name, expected in loaded.checksums.items():
        if layers[name].start.checksum != expected:
            warnings.warn(
                f"the quantized base of {name!r} differs in some codes from the one the adapter "
                "was trained on (another machine's arithmetic); outputs may move by one "
                "quantization step in few weights",
                stacklevel=4,
            )
    guard(peft_model, [layers[name] for name in sorted(names)], done, load_adapter)
    fill(peft_model, folder, adapter_name, done, is_trainable=True)


def load_adapter(
    peft_model: nn.Module,
    model_id: str | PathLike,
    adapter_name: str,
    is_trainable: bool = False,
    **settings: Any,
) -> Any:
    """PEFT's `load_adapter` on a changed base: files for the original base are split.

    Raises:
        ValueError: a file that cannot be right on this base; nothing is changed then.
    """
    refuse_merged(peft_model, "load_adapter")
    folder = Path(model_id)
    owner = base_owner(peft_model)
    method = records(peft_model)[owner].plan.initializer.name
    if read_header(folder) is None or adapter_name not in peft_model.peft_config:
        raise ValueError(
            f"load_adapter({str(model_id)!r}, {adapter_name!r}): {method} has changed the base of "
            f"this model, and the adapter is for the original one; call "
            f"restore_peft_model(peft_model, {owner!r}) first"
        )
    if not same_start(peft_model, folder):
        if adapter_name != owner:
            raise ValueError(
                f"load_adapter({str(model_id)!r}, {adapter_name!r}): the adapter belongs to "
                f"another start of {method} than adapter {owner!r} of this model"
            )
        load_peft_checkpoint(peft_model, folder, adapter_name)
        result = _IncompatibleKeys([], [])
    else:
        done = Journal()
        try:
            settings |= {"is_trainable": is_trainable}
            result = fill(peft_model, folder, adapter_name, done, **settings)
        except BaseException:
            done.undo()
            raise
    if not is_trainable:
        peft_model.eval()
    return result


def _start_of(factors: Factors) -> Factors:
    """A file with a replaced base holds the trained factors, and those that its base was made by.

    These are A0, B0, except for loftq's, whose last step is not needed to make the base again.
    """
    made = factors.replacement
    if made is None:
        return factors
    dtype = factors.lora_A.dtype
    return dataclasses.replace(factors, lora_A=made.lora_A.to(dtype), lora_B=made.lora_B.to(dtype))


def _refuse_other_model(
    folder: Path, layers: Mapping[str, AdaptedLayer], plan: Any, config: Any, theirs: Any
) -> None:
    for target in plan.targets:
        if target.name not in layers:
            raise ValueError(
                f"{str(folder)!r} adapts {target.name!r}, which this PEFT model does not; make it "
                "with the configuration of the training"
            )
    for name in ("use_dora", "use_rslora", "lora_bias", "bias"):
        if getattr(config, name) != getattr(theirs, name):
            raise ValueError(
                f"{str(folder)!r} was trained with {name}={getattr(config, name)!r}, this PEFT "
                f"model has {getattr(theirs, name)!r}"
            )


def fill(
    peft_model: nn.Module, folder: Path, adapter_name: str, done: Journal, **settings: Any
) -> Any:
    """Let PEFT load the trained values, from a file that holds them as it would have written them.

    PEFT's own loader knows about modules trained whole, biases and everything else in there. The
    hook of `load_state_dict` splits factors of rank 2r.

    Args:
        done: gets the present values, which PEFT's loader overwrites in place.
    """
    tensors = load_file(_weights_file(folder))
    last = {key.rpartition(".")[2] for key in tensors}
    for name, parameter in peft_model.named_parameters():
        if f".{adapter_name}." in f"{name}." or (name.endswith(".bias") and "bias" in last):
            done.do(SetData(parameter, parameter.data.clone()))
    parts = (".replacement_A", ".replacement_B", ".initial_A", ".initial_B")
    tensors = {key: value for key, value in tensors.items() if not key.endswith(parts)}
    load = type(peft_model).load_adapter
    with tempfile.TemporaryDirectory() as plain:
        save_file(tensors, Path(plain) / WEIGHTS_NAME, metadata={"format": "pt"})
        return load(peft_model, plain, adapter_name, **settings)


def same_start(peft_model: nn.Module, folder: Path) -> bool:
    """Whether a file's A0 and B0 are those that the model's base was changed by."""
    owner = base_owner(peft_model)
    layers = {layer.name: layer for layer in adapted_layers(peft_model, owner)}
    tensors = load_file(_weights_file(folder))
    return all(
        _same_part(tensors, target, layers[target.name].start, which)
        for target in records(peft_model)[owner].plan.targets
        for which in ("lora_A", "lora_B")
    )


def _same_part(tensors: Mapping[str, Tensor], target: Target, start: Start, which: str) -> bool:
    axis, factor = ("lora_A", "lora_B").index(which), which[-1]
    present = start.factors()[axis]
    if start.replacement is not None:
        present = getattr(start.replacement, which)
        part = tensors.get(part_key(target, f"replacement_{factor}"))
    elif (part := tensors.get(part_key(target, f"initial_{factor}"))) is None:
        doubled = tensors.get(part_key(target, which))
        if doubled is not None and doubled.shape[axis] == 2 * target.rank:
            part = doubled.narrow(axis, target.rank, target.rank).flatten(1)
            part = -part if which == "lora_B" else part
    if part is None or part.shape != present.shape:
        return False
    return torch.equal(part.to(present), present)


def _weights_file(folder: Path) -> Path:
    own = folder / OWN_WEIGHTS_NAME
    return own if own.is_file() else folder / WEIGHTS_NAME


def read_header(folder: Path) -> dict[str, Any] | None:
    """Our part of a file's header; None for a file of PEFT's, or none at all."""
    path = _weights_file(folder)
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata[HEADER_KEY]) if HEADER_KEY in metadata else None
