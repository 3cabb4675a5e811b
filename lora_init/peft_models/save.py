"""Adapter files of a PEFT model whose base was changed: written for the original base, read back.

PEFT writes A and B as they are, which on the original base is another model. What is written here
is what `lora_init.adapters` describes: [A; A0], [B, -B0] of rank 2r for a base that was subtracted
from, with the split in the header, so that the same file is a plain adapter for everybody and a
training checkpoint for `load_peft_checkpoint` (float32 factors: to the bit). For a base that was
replaced or quantised anew PEFT's format has no expression: `lora_init_adapter.safetensors` holds A,
B and the recipe of the base. Trainer looks for `adapter_model.safetensors`, so there is one, with a
tensor that nothing can load; and the configuration says what to do.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_init.adapters.format import (
    HEADER_KEY,
    OWN_WEIGHTS_NAME,
    WEIGHTS_NAME,
    part_key,
)
from lora_init.adapters.own import FORMAT_VERSION
from lora_init.adapters.save import exported_config
from lora_init.config.lora_config import CONFIG_NAME
from lora_init.files import write_atomically
from lora_init.peft_models.layers import AdaptedLayer, check_peft_model
from lora_init.peft_models.start import Record, Start, base_owner, records
from lora_init.peft_models.state_dict import (
    changed_start,
    extend,
    layers_like,
    plain_state_dict,
    shorten,
)
from lora_init.registry import describe


def save_peft_model(
    peft_model: nn.Module, folder: str | PathLike, adapter_name: str = "default", **settings: Any
) -> None:
    """Write an adapter for the original base, in PEFT's format.

    `peft_model.save_pretrained(folder)` does the same for all adapters, after
    `initialize_peft_model` as well: use either. On a kept base it is PEFT's own file.

    Args:
        folder: gets `adapter_config.json` and `adapter_model.safetensors` (in a folder inside it,
            for an adapter that is not called "default": PEFT's rule).
        settings: further arguments of PEFT's `save_pretrained`, such as `state_dict`.

    Raises:
        TypeError, ValueError: no PEFT model, no such adapter, or a setting that would write
            something else.
    """
    check_peft_model(peft_model, adapter_name)
    peft_model.save_pretrained(str(folder), selected_adapters=[adapter_name], **settings)


def save_pretrained(
    peft_model: nn.Module,
    save_directory: str | PathLike,
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
            "safe_serialization=False: a pickle cannot say which part of it is the start; leave it "
            "at True"
        )
    if path_initial_model_for_weight_conversion is not None:
        raise ValueError(
            "path_initial_model_for_weight_conversion is given, but what save_pretrained writes is "
            "for the original base already; leave it out"
        )
    chosen = list(peft_model.peft_config) if selected_adapters is None else selected_adapters
    written = {name: layers_like(peft_model, name) for name in chosen}
    state = settings.pop("state_dict", None)
    for name, layers in written.items():
        folder = Path(save_directory) / (name if name != "default" else "")
        _save_one(
            peft_model, name, layers, Path(save_directory), folder, is_main_process, state,
            save_embedding_layers=save_embedding_layers, **settings,
        )  # fmt: skip


def _save_one(
    peft_model: nn.Module,
    name: str,
    layers: list[AdaptedLayer],
    save_directory: Path,
    folder: Path,
    is_main_process: bool,
    state: dict[str, Tensor] | None,
    **settings: Any,
) -> None:
    """Have PEFT write a converted state and configuration, and add the header."""
    record = records(peft_model)[base_owner(peft_model)]
    starts = {layer.name: changed_start(layer) for layer in layers}
    replaced = any(start.replacement is not None for start in starts.values())
    theirs = peft_model.peft_config[name]
    converted = copy.deepcopy(theirs)
    if replaced:
        # PEFT refuses an unknown start with these words, until the configuration is rewritten.
        converted.init_lora_weights = _notice(record)
    else:
        _double(converted, record)
    state = plain_state_dict(peft_model) if state is None else dict(state)
    paths = {id(module): path for path, module in peft_model.named_modules()}
    for layer in layers:
        path = paths[id(layer.module)]
        (shorten if replaced else extend)(state, path, layer)
        # PEFT saves an adapted embedding whole. Its base is in the base model already.
        state.pop(f"{path}.base_layer.weight", None)
    if is_main_process:
        for stale in (CONFIG_NAME, OWN_WEIGHTS_NAME):
            (folder / stale).unlink(missing_ok=True)  # another adapter's
    peft_model.peft_config[name] = converted
    try:
        type(peft_model).save_pretrained(
            peft_model, str(save_directory), selected_adapters=[name], state_dict=state,
            is_main_process=is_main_process, **settings,
        )  # fmt: skip
    finally:
        peft_model.peft_config[name] = theirs
    if is_main_process:
        _add_header(folder, record, starts, replaced)


def _double(converted: Any, record: Record) -> None:
    """PEFT's configuration of the same adapter at rank 2r."""
    doubled = exported_config(record.config, record.plan)
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        setattr(converted, name, getattr(doubled, name))
    converted.init_lora_weights = True
    converted.eva_config, converted.corda_config, converted.loftq_config = None, None, {}


def _notice(record: Record) -> str:
    return (
        f"{record.plan.initializer.name} of lora_init: the base was replaced, and its recipe is in "
        f"{OWN_WEIGHTS_NAME}. Load it with lora_init.load_peft_checkpoint(peft_model, folder) or "
        "lora_init.LoraModel.from_pretrained(base, folder)"
    )


def _add_header(folder: Path, record: Record, starts: Mapping[str, Start], replaced: bool) -> None:
    """Rewrite a file of PEFT's so that its start can be told from what was trained."""
    spec = record.plan.initializer
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "method": describe(spec, record.plan.options),
        "base": spec.base,
        "config": record.config.to_dict(),
        "quantized_base": record.plan.quantized_base,
        "fingerprints": {name: start.fingerprint for name, start in starts.items()},
    }
    path = folder / WEIGHTS_NAME
    # With bias="all" PEFT writes what is trained whole a second time, and its original.
    doubles = (".modules_to_save.", ".original_module.")
    tensors = {
        key: value
        for key, value in load_file(path).items()
        if not any(part in key for part in doubles)
    }
    if replaced:
        made = {n: start for n, start in starts.items() if start.replacement is not None}
        header["quantizers"] = {n: s.replacement.quantizer.to_dict() for n, s in made.items()}
        header["checksums"] = {n: start.checksum for n, start in made.items()}
        header["from_original_weights"] = {
            n: start.from_original_weights
            for n, start in made.items()
            if start.from_original_weights
        }
        for target in record.plan.targets:
            start, part = starts[target.name], "initial"
            factors = start.factors()
            if start.replacement is not None:
                factors, part = (start.replacement.lora_A, start.replacement.lora_B), "replacement"
            for factor, value in zip("AB", factors, strict=True):
                key = part_key(target, f"{part}_{factor}")
                tensors[key] = value.detach().cpu().contiguous()
    metadata = {"format": "pt", HEADER_KEY: json.dumps(header)}
    name = OWN_WEIGHTS_NAME if replaced else WEIGHTS_NAME
    write_atomically(
        folder / name, lambda temporary: save_file(tensors, temporary, metadata=metadata)
    )
    if replaced:
        _bar(folder, record)


def _bar(folder: Path, record: Record) -> None:
    """Make sure that nobody loads A and B alone."""
    first = record.plan.targets[0]
    empty = torch.empty(0, first.shape[1], dtype=torch.float32, device="cpu")
    stub = {part_key(first, "lora_A"): empty}
    write_atomically(
        folder / WEIGHTS_NAME,
        lambda temporary: save_file(stub, temporary, metadata={"format": "pt"}),
    )
    config = folder / CONFIG_NAME
    values = json.loads(config.read_text())
    values["peft_type"] = _notice(record)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    write_atomically(config, lambda temporary: temporary.write_text(text))
