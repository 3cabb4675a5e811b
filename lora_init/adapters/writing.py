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

from lora_init.adapters.names import HEADER_KEY, OWN_WEIGHTS_NAME, PREFIX, WEIGHTS_NAME
from lora_init.config import CONFIG_NAME, LoraConfig
from lora_init.injection import Injection
from lora_init.plan import Plan
from lora_init.registry import describe


def save(folder: Path, config: LoraConfig, plan: Plan, injection: Injection) -> None:
    """Write the adapter's two files; each appears whole or not at all."""
    base = plan.initializer.base
    header: dict[str, Any] = {
        "format_version": 1,
        "method": describe(plan.initializer, plan.options),
        "base": base,
        "config": config.to_dict(),
        "fingerprints": injection.fingerprints,
    }
    if base == "replace":
        some = next(iter(injection.replacements.values()))
        header["quantizer"] = some.quantizer.to_dict()
        header["checksums"] = injection.checksums
    tensors = {}
    for name, layer in injection.layers.items():
        lora_A, lora_B = layer.lora_A.detach(), layer.lora_B.detach()
        if base == "subtract":
            lora_A = torch.cat([lora_A, layer.initial_lora_A])
            lora_B = torch.cat([lora_B, -layer.initial_lora_B], dim=1)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_B
        if base == "replace":
            replacement = injection.replacements[name]
            tensors[f"{PREFIX}{name}.replacement_A"] = replacement.lora_A
            tensors[f"{PREFIX}{name}.replacement_B"] = replacement.lora_B
    for name, trained in injection.trained.items():
        for key, value in trained.trained_module.state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = value
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}

    written = _exported_config(config, plan)
    folder.mkdir(parents=True, exist_ok=True)
    name, other = (
        (OWN_WEIGHTS_NAME, WEIGHTS_NAME) if base == "replace" else (WEIGHTS_NAME, OWN_WEIGHTS_NAME)
    )
    _write_atomically(
        folder / name,
        lambda path: save_file(
            tensors, path, metadata={"format": "pt", HEADER_KEY: json.dumps(header)}
        ),
        # Between the two files a folder is without a configuration, never with another adapter's:
        # a wrong alpha would be loaded in silence.
        last=lambda: (folder / CONFIG_NAME).unlink(missing_ok=True),
    )
    text = written.to_json()
    _write_atomically(folder / CONFIG_NAME, lambda path: path.write_text(text))
    (folder / other).unlink(missing_ok=True)  # a leftover would be another adapter's weights


def _exported_config(config: LoraConfig, plan: Plan) -> LoraConfig:
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
    if plan.initializer.base == "subtract":
        factor = math.sqrt(2) if config.use_rslora else 2
        written.r = 2 * config.r
        written.lora_alpha = config.lora_alpha * factor
        written.rank_pattern = {k: 2 * v for k, v in written.rank_pattern.items()}
        written.alpha_pattern = {k: v * factor for k, v in written.alpha_pattern.items()}
    return written


def _write_atomically(
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
