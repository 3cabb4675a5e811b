"""Writing an adapter; see the package for the format."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_init.adapters.layout import (
    HEADER_KEY,
    OWN_WEIGHTS_NAME,
    PREFIX,
    WEIGHTS_NAME,
    bias_key,
    file_shape,
    part_key,
    peft_computes,
)
from lora_init.config import CONFIG_NAME, LoraConfig
from lora_init.injection import Injection
from lora_init.layers import LoraLayer
from lora_init.plan import Plan, Target
from lora_init.registry import describe


def save(folder: Path, config: LoraConfig, plan: Plan, injection: Injection) -> None:
    """Write the adapter's two files; each appears whole or not at all."""
    replaced = bool(injection.replacements)
    header: dict[str, Any] = {
        "format_version": 1,
        "method": describe(plan.initializer, plan.options),
        "base": plan.initializer.base,
        "config": config.to_dict(),
        "quantized_base": plan.quantized_base,
        "fingerprints": injection.fingerprints,
    }
    if replaced:
        header["quantizers"] = {
            name: replacement.quantizer.to_dict()
            for name, replacement in injection.replacements.items()
        }
        header["checksums"] = injection.checksums
        header["from_original_weights"] = injection.from_original_weights
    tensors: dict[str, Tensor] = {}
    for target in plan.targets:
        layer = injection.layers[target.name]
        parts = _own_parts(target, injection) if replaced else _parts(layer)
        for part, value in parts.items():
            rank = len(value) if part.endswith("_A") else value.shape[-1]
            shape = file_shape(target, layer.base_layer, part, rank)
            tensors[part_key(target, part)] = value.reshape(shape)
    for name, (bias, _) in injection.biases.items():
        tensors[bias_key(name, injection.layers)] = bias
    for name, trained in injection.trained.items():
        for key, value in trained.trained_module.state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = value
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}

    written = exported_config(config, plan)
    folder.mkdir(parents=True, exist_ok=True)
    own = replaced or not all(map(peft_computes, _base_modules(injection)))
    names = (OWN_WEIGHTS_NAME, WEIGHTS_NAME) if own else (WEIGHTS_NAME, OWN_WEIGHTS_NAME)
    write_atomically(
        folder / names[0],
        lambda path: save_file(
            tensors, path, metadata={"format": "pt", HEADER_KEY: json.dumps(header)}
        ),
        # Between the two files a folder is without a configuration, never with another adapter's:
        # a wrong alpha would be loaded in silence.
        last=lambda: (folder / CONFIG_NAME).unlink(missing_ok=True),
    )
    text = written.to_json()
    write_atomically(folder / CONFIG_NAME, lambda path: path.write_text(text))
    (folder / names[1]).unlink(missing_ok=True)  # a leftover would be another adapter's weights


def _base_modules(injection: Injection) -> list[nn.Module]:
    return [layer.base_layer for layer in injection.layers.values()]


def _parts(layer: LoraLayer) -> dict[str, Tensor]:
    """A layer's adapter on its original base: of rank 2r where the base was subtracted from."""
    lora_A, lora_B = layer.lora_A.detach(), layer.lora_B.detach()
    if layer.base_state in ("edited", "in_forward"):
        lora_A = torch.cat([lora_A, layer.initial_lora_A])
        lora_B = torch.cat([lora_B, -layer.initial_lora_B], dim=1)
    return {"lora_A": lora_A, "lora_B": lora_B} | _vectors(layer)


def _own_parts(target: Target, injection: Injection) -> dict[str, Tensor]:
    """A layer's factors as they are, and what makes its base out of the original one."""
    layer = injection.layers[target.name]
    parts = {"lora_A": layer.lora_A.detach(), "lora_B": layer.lora_B.detach()} | _vectors(layer)
    if layer.base_state == "replaced":
        replacement = injection.replacements[target.name]
        return parts | {"replacement_A": replacement.lora_A, "replacement_B": replacement.lora_B}
    return parts | {"initial_A": layer.initial_lora_A, "initial_B": layer.initial_lora_B}


def _vectors(layer: LoraLayer) -> dict[str, Tensor]:
    vectors = {part: getattr(layer, part) for part in ("lora_bias", "lora_magnitude_vector")}
    return {part: value.detach() for part, value in vectors.items() if value is not None}


def exported_config(config: LoraConfig, plan: Plan) -> LoraConfig:
    """The configuration as a plain adapter's: at rank 2r for a subtracted base."""
    written = dataclasses.replace(
        plan.explicit(config),
        init_lora_weights=True,
        eva_config=None,
        corda_config=None,
        loftq_config={},
    )
    written.inference_mode = True
    written.fan_in_fan_out = any(target.module_type == "Conv1D" for target in plan.targets)
    if plan.modules_to_save:
        written.modules_to_save = list(plan.modules_to_save)
    if plan.initializer.base == "subtract" and not plan.replaced:
        factor = math.sqrt(2) if config.use_rslora else 2
        written.r = 2 * config.r
        written.lora_alpha = config.lora_alpha * factor
        written.rank_pattern = {k: 2 * v for k, v in written.rank_pattern.items()}
        written.alpha_pattern = {k: v * factor for k, v in written.alpha_pattern.items()}
    return written


def write_atomically(
    path: Path, write: Callable[[Path], Any], last: Callable[[], Any] = lambda: None
) -> None:
    """Write beside `path`, call `last`, and put the file in its place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)
        last()
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
