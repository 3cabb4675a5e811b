"""Saving adapters of a PEFT model whose base was changed, for the original base.

PEFT would write A and B as they are, which on the original base is another model.

- If the base was subtracted from, [A; A0] and [B, -B0] of rank 2r are written, as
  `lora_init.adapters` describes. The header says where they split. Any program loads the file as a
  plain adapter, and `load_peft_checkpoint` resumes from it (float32 factors exactly).
- A replaced or requantized base has no form in PEFT's format. `lora_init_adapter.safetensors` then
  holds A, B and the recipe of the base. Trainer looks for `adapter_model.safetensors`, so that
  exists too, with a tensor that no program can load; the configuration says what to do.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_init.adapters.format import HEADER_KEY, OWN_WEIGHTS_NAME, PREFIX, WEIGHTS_NAME, part_key
from lora_init.adapters.own import FORMAT_VERSION
from lora_init.config.lora_config import CONFIG_NAME
from lora_init.files import write_atomically
from lora_init.peft_models.exported import exported_peft_config
from lora_init.peft_models.holder import checked_holder, is_peft_model
from lora_init.peft_models.layers import AdaptedLayer
from lora_init.peft_models.start import Record, base_owner, records
from lora_init.peft_models.state_dict import extend, layers_like, plain_state_dict, shorten
from lora_init.registry import describe

# With bias="all" PEFT writes what is trained whole a second time, and its original.
SURPLUS = (".modules_to_save.", ".original_module.")


def save_peft_model(
    peft_model: Any, folder: str | PathLike[str], adapter_name: str = "default", **settings: Any
) -> None:
    """Write an adapter for the original base, in PEFT's format.

    After `initialize_peft_model`, `save_pretrained(folder)` of a PeftModel does the same for all
    adapters: use either. On a kept base it writes PEFT's own file. A model that is not a PeftModel
    has functions with other formats, which are right too unless the method replaces the base.

    Args:
        folder: gets `adapter_config.json` and `adapter_model.safetensors`. An adapter that is not
            called "default" gets a folder inside it: PEFT's rule.
        settings: further arguments of PEFT's `save_pretrained`, such as `state_dict`.

    Raises:
        TypeError, ValueError: not a model with PEFT's layers, no such adapter, or a setting that
            would write something else.
    """
    holder = checked_holder(peft_model, adapter_name)
    if is_peft_model(holder):
        holder.save_pretrained(str(folder), selected_adapters=[adapter_name], **settings)
    elif base_owner(holder) is None:
        _write_plain(holder, adapter_name, Path(folder), **settings)
    else:
        save_pretrained(holder, folder, selected_adapters=[adapter_name], **settings)


def save_pretrained(
    peft_model: Any,
    save_directory: str | PathLike[str],
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | None = None,
    **settings: Any,
) -> None:
    """PEFT's `save_pretrained` on a changed base: what is written is for the original base.

    Raises:
        ValueError: a pickled file, which has no header; PEFT's own conversion on top of this one;
            an adapter whose layers, ranks or scalings are not those that the base was changed by.
    """
    if not safe_serialization:
        raise ValueError(
            "safe_serialization=False is not supported: must be True. A pickle cannot say which "
            "part of it is the start"
        )
    if path_initial_model_for_weight_conversion is not None:
        raise ValueError(
            "path_initial_model_for_weight_conversion is not supported: must be None. What "
            "save_pretrained writes is for the original base already"
        )
    chosen = list(peft_model.peft_config) if selected_adapters is None else selected_adapters
    written = {name: layers_like(peft_model, name) for name in chosen}
    settings |= {"save_embedding_layers": save_embedding_layers, "is_main_process": is_main_process}
    for name, layers in written.items():
        _save_one(peft_model, name, layers, Path(save_directory), **settings)


def _save_one(
    peft_model: Any,
    name: str,
    layers: list[AdaptedLayer],
    save_directory: Path,
    *,
    is_main_process: bool,
    state_dict: dict[str, Tensor] | None = None,
    **settings: Any,
) -> None:
    """Let PEFT write a converted state and configuration, and add the header."""
    record = records(peft_model)[base_owner(peft_model) or name]
    is_replaced = any(layer.base_start.replacement is not None for layer in layers)
    state = plain_state_dict(peft_model) if state_dict is None else dict(state_dict)
    paths = {id(module): path for path, module in peft_model.named_modules()}
    for layer in layers:
        path = paths[id(layer.module)]
        (shorten if is_replaced else extend)(state, path, layer)
        # PEFT saves an adapted embedding whole. Its base is in the base model already.
        state.pop(f"{path}.base_layer.weight", None)
    folder = save_directory / (name if name != "default" else "")
    if is_main_process:
        for other_adapters in (CONFIG_NAME, OWN_WEIGHTS_NAME):
            (folder / other_adapters).unlink(missing_ok=True)
    theirs = peft_model.peft_config[name]
    peft_model.peft_config[name] = _converted_config(theirs, record, is_replaced)
    settings |= {"state_dict": state, "is_main_process": is_main_process}
    try:
        if is_peft_model(peft_model):
            settings["selected_adapters"] = [name]
            type(peft_model).save_pretrained(peft_model, str(save_directory), **settings)
        else:
            _write_plain(peft_model, name, save_directory, **settings)
    finally:
        peft_model.peft_config[name] = theirs
    if is_main_process:
        _rewrite(folder, record, {layer.name: layer for layer in layers}, is_replaced)


def _write_plain(
    model: Any,
    name: str,
    save_directory: Path,
    *,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    save_embedding_layers: str | bool = "auto",
) -> None:
    """Write what PEFT's `save_pretrained` writes, of a model that is not a PeftModel."""
    get_state = sys.modules["peft"].get_peft_model_state_dict
    state = get_state(
        model, state_dict, adapter_name=name, save_embedding_layers=save_embedding_layers
    )
    if not is_main_process:
        return
    folder = save_directory / (name if name != "default" else "")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + key: value.detach().cpu().contiguous() for key, value in state.items()}
    _write(folder / WEIGHTS_NAME, tensors, None)
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _converted_config(theirs: Any, record: Record, is_replaced: bool) -> Any:
    """PEFT's configuration of the same adapter on the original base, at rank 2r."""
    if not is_replaced:
        return exported_peft_config(theirs, record.config, record.plan)
    converted = copy.copy(theirs)
    vars(converted).pop("to_dict", None)
    # PEFT refuses an unknown method with these words, until the configuration is rewritten.
    converted.init_lora_weights = _notice(record)
    return converted


def _notice(record: Record) -> str:
    return (
        f"{record.plan.initializer.name} of lora_init: the base was replaced, and its recipe is in "
        f"{OWN_WEIGHTS_NAME}. Load it with lora_init.load_peft_checkpoint(peft_model, folder) or "
        "lora_init.LoraModel.from_pretrained(base, folder)"
    )


def _rewrite(
    folder: Path, record: Record, layers: Mapping[str, AdaptedLayer], is_replaced: bool
) -> None:
    """Rewrite a file of PEFT's so that it tells the start from what was trained."""
    plan = record.plan
    starts = {name: layer.base_start for name, layer in layers.items()}
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "method": describe(plan.initializer, plan.options),
        "base": plan.initializer.base,
        "config": record.config.to_dict(),
        "quantized_base": plan.quantized_base,
        "fingerprints": {name: start.fingerprint for name, start in starts.items()},
    }
    tensors = {
        key: value
        for key, value in load_file(folder / WEIGHTS_NAME).items()
        if not any(part in key for part in SURPLUS)
    }
    if not is_replaced:
        _write(folder / WEIGHTS_NAME, tensors, header)
        return
    quantizers, checksums, originals = {}, {}, {}
    for target in plan.targets:
        name, start, part = target.name, starts[target.name], "initial"
        factors = start.factors()
        if start.replacement is not None:
            part = "replacement"
            factors = start.replacement.lora_A, start.replacement.lora_B
            quantizers[name] = start.replacement.quantizer.to_dict()
            checksums[name] = start.checksum
            if start.from_original_weights:
                originals[name] = start.from_original_weights
        for letter, value in zip("AB", factors, strict=True):
            key = part_key(target, f"{part}_{letter}")
            tensors[key] = value.detach().cpu().contiguous()
    header |= {"quantizers": quantizers, "checksums": checksums, "from_original_weights": originals}
    _write(folder / OWN_WEIGHTS_NAME, tensors, header)
    # A and B alone would be another model: no program may load them.
    first = plan.targets[0]
    empty = torch.empty(0, first.shape[1], dtype=torch.float32, device="cpu")
    _write(folder / WEIGHTS_NAME, {part_key(first, "lora_A"): empty}, None)
    config = folder / CONFIG_NAME
    values = json.loads(config.read_text()) | {"peft_type": _notice(record)}
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    write_atomically(config, lambda temporary: temporary.write_text(text))


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any] | None) -> None:
    metadata = {"format": "pt"} | ({HEADER_KEY: json.dumps(header)} if header else {})
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
