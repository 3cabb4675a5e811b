"""Read the files of an adapter from lora_init or PEFT, and check them against a base model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_init.adapters.attention_keys import in_model
from lora_init.adapters.core_file import read_cores
from lora_init.adapters.diffusers_format import DIFFUSERS_NAME, as_peft
from lora_init.adapters.expert_layout import named
from lora_init.adapters.format import HEADER_KEY, OWN_WEIGHTS_NAME, WEIGHTS_NAME
from lora_init.adapters.load_peft import foreign_config, read_foreign
from lora_init.adapters.loaded import LoadedAdapter
from lora_init.adapters.own import read_own
from lora_init.adapters.tensors import Contents
from lora_init.config.file import CONFIG_NAME, read_json, refuse_lfs_pointer
from lora_init.injection import Injection
from lora_init.layers.attention import SplitAttention, split
from lora_init.plan.check import FLOAT_DTYPES
from lora_init.plan.parameters import fused_parameters
from lora_init.weights.sharded import assign
from lora_init.weights.source import BaseWeights


def read(
    folder: Path,
    base: nn.Module,
    adapter_dtype: torch.dtype,
    original_weights: str | PathLike | Mapping[str, Tensor] | None = None,
) -> LoadedAdapter:
    """Read an adapter and check every tensor against `base`.

    Args:
        folder: the folder of the adapter, in the format of PEFT or diffusers.
        base: the base model. Its attention modules that the file adapts stay split, also after an
            error: call `lora_init.layers.attention.join` then.
        adapter_dtype: the dtype of the factors in the model.
        original_weights: the original weights of quantized or unloaded modules.

    Raises:
        FileNotFoundError: the configuration or the safetensors file is missing. Pickles are not
            supported.
        ValueError: a file is damaged; a tensor is missing, unknown, not finite or has a wrong
            shape; the base model differs; or the base of a PEFT adapter cannot be restored.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}. Pass a folder that save_pretrained wrote."
        )
    if (folder / DIFFUSERS_NAME).is_file() and not (folder / CONFIG_NAME).is_file():
        tensors, metadata = read_safetensors(folder / DIFFUSERS_NAME)
        (tensors, values), header = as_peft(tensors, metadata, base), None
    else:
        values = read_json(folder / CONFIG_NAME)
        tensors, header = read_tensors(folder)
    weights = BaseWeights(base, original_weights)
    try:
        foreign = foreign_config(values) if header is None else None
        parameters = values.get("target_parameters") or []
        tensors = named(tensors, parameters, fused_parameters(base))
        tensors, attentions = in_model(tensors, base)
        split(base, (name for name in attentions if not _is_split(base, name)))
        contents = Contents(tensors, base, adapter_dtype)
        if foreign is None:
            assert header is not None
            cores = None
            if isinstance(expected := header.get("core"), str):
                cores = read_cores(folder, expected)
            return read_own(contents, weights, header, values, cores)
        return read_foreign(contents, weights, *foreign)
    except (
        ValueError,
        TypeError,
    ) as error:  # TypeError: the file adapts an unsupported module type
        if str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: {error}") from error


def _is_split(base: nn.Module, name: str) -> bool:
    return isinstance(base.get_submodule(name), SplitAttention)


def fill(injection: Injection, loaded: LoadedAdapter) -> None:
    """Copy the trained values of a file into a model after injection of its initial factors."""
    for name, expected in loaded.checksums.items():
        if injection.checksums.get(name) != expected:
            warnings.warn(
                f"some codes in the quantized base of {name!r} differ from those of the training, "
                "because another machine rounds differently. A few weights may change by one "
                "quantization step.",
                stacklevel=5,
            )
    for name, parts in loaded.parts.items():
        layer = injection.layers[name]
        if parts["lora_A"].shape[-1] != layer.lora_A.shape[-1]:  # for the channels of all groups
            wide = layer.lora_A.data.new_empty(parts["lora_A"].shape)
            layer.lora_A = nn.Parameter(wide, requires_grad=layer.lora_A.requires_grad)
        for part, value in parts.items():
            assign(getattr(injection.layers[name], part), value)
    for name, state in loaded.trained_modules.items():
        injection.trained[name].trained_module.load_state_dict(state)
    for name, value in loaded.biases.items():
        assign(injection.biases[name][0], value)


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read the tensors of an adapter's file, and its header (None if PEFT wrote the file).

    Raises:
        FileNotFoundError: the safetensors file is missing.
        ValueError: the file is damaged, or a tensor is not finite.
    """
    path = folder / OWN_WEIGHTS_NAME
    if not path.is_file():
        path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which is not supported; convert it with PEFT)"
        hint = pickled if (folder / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {str(folder)!r}{hint}")
    tensors, metadata = read_safetensors(path)
    if HEADER_KEY not in metadata:
        return tensors, None
    try:
        header = json.loads(metadata[HEADER_KEY])
        if not isinstance(header, dict):
            raise ValueError(f"its header must be a JSON object, not {metadata[HEADER_KEY]:.40}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or save it again.") from error
    return tensors, header


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        ValueError: the file is damaged, or a tensor is not finite.
    """
    refuse_lfs_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or save it again.") from error
    for key, value in tensors.items():
        if value.dtype in FLOAT_DTYPES and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: tensor {key!r} contains NaN or infinite values")
    return tensors, metadata
