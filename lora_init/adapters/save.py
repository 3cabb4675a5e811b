"""Save an adapter; `lora_init.adapters` describes the format."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lora_init.adapters import attention_keys
from lora_init.adapters.core_file import write_cores
from lora_init.adapters.embeddings import description, embeddings, rows, rows_are_needed
from lora_init.adapters.expert_layout import nested
from lora_init.adapters.format import (
    CORE_NAME,
    HEADER_KEY,
    OWN_WEIGHTS_NAME,
    PREFIX,
    WEIGHTS_NAME,
    bias_key,
    doubled_rank,
    in_file,
    part_key,
    peft_computes,
    peft_transposes,
)
from lora_init.adapters.given import Given
from lora_init.adapters.keys import plain_names, with_names
from lora_init.adapters.peft_selection import describe_differences, different_in_peft
from lora_init.adapters.portable import (
    portable_config,
    portable_factors,
    read_differently,
    refuse_not_portable,
)
from lora_init.adapters.saved_modules import selected_by_peft
from lora_init.config.lora_config import CONFIG_NAME, LoraConfig
from lora_init.factors import output_factor
from lora_init.files import write_atomically
from lora_init.injection import Injection
from lora_init.linalg.precision import full_precision
from lora_init.plan.match import PatternValues
from lora_init.plan.plan import Plan, Target
from lora_init.registry import describe, resolve
from lora_init.weights.kinds import known_format
from lora_init.weights.patches import is_transposed
from lora_init.weights.sharded import whole


def save_adapter(
    folder: Path,
    model: nn.Module,
    config: LoraConfig,
    plan: Plan,
    injection: Injection,
    *,
    state: Mapping[str, Tensor] | None = None,
    save_embedding_layers: str | bool = "auto",
    portable: bool = False,
    write: bool = True,
) -> None:
    """Write the files of an adapter, each of them atomically.

    Args:
        folder: the folder to write, which is created if needed.
        model: the base model, after injection.
        config: the settings of the adapter.
        plan: the adapted layers.
        injection: the injected layers and their original weights.
        state: a state dict with the adapter's tensors; None for those of the model.
        save_embedding_layers, portable: see `LoraModel.save_pretrained`.
        write: False on ranks that only take part in gathering shards.

    Raises:
        ValueError: a setting is not supported for this adapter. Nothing is written then.
    """
    if portable:
        refuse_not_portable(plan)
    given = Given(state, model)
    names = plain_names(model)
    plain = with_names(plan, names)
    replaced = bool(injection.replacements)
    entries, copied = selected_by_peft(plain.modules_to_save, plain.candidates, config.task)
    written = exported_config(config, plain)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, Target]] = {}
    factors = {t.name: _parts(t, injection, given, replaced) for t in plan.targets}
    largest = max(parts["lora_A"].shape[-2] for parts in factors.values())
    for target, as_written in zip(plan.targets, plain.targets, strict=True):
        parts, layer = factors[target.name], injection.layers[target.name]
        if portable:
            parts["lora_A"], parts["lora_B"] = portable_factors(
                parts["lora_A"], parts["lora_B"], target.scaling, largest
            )
        if peft_transposes(target, layer.base_layer):
            parts["lora_A"], parts["lora_B"] = parts["lora_B"].mT, parts["lora_A"].mT
        rank = parts["lora_A"].shape[-2]
        ranks[as_written.name] = rank, target
        for part, value in parts.items():
            stored = in_file(target, layer.base_layer, part, value, rank)
            tensors[part_key(as_written, part)] = stored
    fused = [target.name for target in plain.targets if target.experts is not None]
    tensors = nested(tensors, fused, PREFIX)
    layers = {t.name for t in plain.targets}
    for name, (bias, _) in injection.biases.items():
        module, _, last = name.rpartition(".")
        key = f"{names[module]}.{last}".removeprefix(".")
        tensors[bias_key(key, layers)] = given.bias(name, bias)
    for name, trained in injection.trained.items():
        for key, value in trained.trained_module.state_dict(keep_vars=True).items():
            tensors[f"{PREFIX}{names[name]}.{key}"] = given.trained(name, key, value)
    copied = _copied(model, names, copied, layers)
    tensors |= {
        f"{PREFIX}{name}.{key}": value
        for name, module in copied.items()
        for key, value in module.state_dict(keep_vars=True).items()
    }
    targeted = [target.name for target in plain.targets]
    if rows_are_needed(
        model,
        save_embedding_layers,
        targeted,
        config.base_model_name_or_path,
        injection.embedding_rows,
    ):
        saved_rows = _rows(model, plan, injection, required=save_embedding_layers is True)
        for key, value in saved_rows.items():
            module, _, last = key.removeprefix(PREFIX).rpartition(".")
            tensors.setdefault(f"{PREFIX}{names[module]}.{last}", value)
    written.modules_to_save = entries or config.modules_to_save
    if portable:
        written = portable_config(written, largest)
    elif (warning := read_differently(plan, written, ranks)) is not None and not replaced:
        warnings.warn(warning, stacklevel=3)
    if not replaced and (differences := different_in_peft(model, plain)):
        warnings.warn(
            "PEFT would load the saved adapter differently; load it with "
            f"LoraModel.from_pretrained: {describe_differences(differences)}",
            stacklevel=3,
        )
    cores = {} if portable else _cores(plan, injection, given, names)
    header = {
        **(_plain_header(written) if portable else _header(config, plain, injection, names)),
        "fingerprints": {names[n]: value for n, value in injection.fingerprints.items()},
        "modules_to_save": list(plain.modules_to_save),
        "copied_modules": list(copied),
        "vocabulary": {names[n]: value for n, value in description(model).items()},
    }
    transposed = [t.name for t, one in zip(plain.targets, plan.targets, strict=True)
                  if is_transposed(injection.layers[one.name].base_layer)]  # fmt: skip
    if transposed:
        warnings.warn(
            f"PEFT has no adapter for transposed convolutions ({transposed[0]!r}), so only "
            "LoraModel.from_pretrained can load the saved adapter",
            stacklevel=3,
        )
    attentions = {t.attention for t in plain.targets if t.attention is not None}
    tensors = {key: whole(value) for key, value in tensors.items()}
    tensors = attention_keys.in_file(tensors, attentions)
    own = replaced or not all(
        peft_computes(layer.base_layer, plan.use_dora) for layer in injection.layers.values()
    )
    if attentions and (plan.use_dora or plan.lora_bias):
        own = True  # PEFT refuses the first and ignores the second
    if write:
        _write(folder, tensors, header, written, own, cores)


def _cores(
    plan: Plan, injection: Injection, given: Given, names: Mapping[str, str]
) -> dict[str, dict[str, Tensor]]:
    """B and R of the layers that have a core, by the names in the file."""
    if not plan.initializer.has_core:
        return {}
    parts = ("lora_B", "lora_core")
    return {
        names[t.name]: {
            part: given.part(t.name, part, getattr(injection.layers[t.name], part))
            for part in parts
        }
        for t in plan.targets
    }


def _rows(
    model: nn.Module, plan: Plan, injection: Injection, *, required: bool
) -> dict[str, Tensor]:
    """The original embeddings, except those whose weight was replaced."""
    originals: dict[str, Tensor] = {}
    left_out = set(injection.trained)
    names = embeddings(model)
    for target in plan.targets:
        if target.name not in names:
            continue
        layer = injection.layers[target.name]
        if layer.base_state == "replaced" or (layer.base_layer.weight.is_meta and not required):
            left_out.add(target.name)
        elif not layer.base_layer.weight.is_meta:
            base, weight = layer.base_layer, injection.original_weight(target)
            originals[target.name] = known_format(base).stored(base, weight).to(base.weight.dtype)
    return rows(model, left_out, originals, required)


def _write(
    folder: Path,
    tensors: dict[str, Tensor],
    header: dict,
    config: LoraConfig,
    own: bool,
    cores: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write all files, and remove old weights with other names."""
    tensors = {key: value.cpu().contiguous().clone() for key, value in tensors.items()}
    text = config.to_json()
    folder.mkdir(parents=True, exist_ok=True)
    if cores:  # first: the header of an interrupted save does not know this file
        header = header | {"core": write_cores(folder, cores)}
    metadata = {"format": "pt", HEADER_KEY: json.dumps(header)}
    names = (OWN_WEIGHTS_NAME, WEIGHTS_NAME) if own else (WEIGHTS_NAME, OWN_WEIGHTS_NAME)
    write_atomically(
        folder / names[0],
        lambda path: save_file(tensors, path, metadata=metadata),
        # Remove the old configuration before the weights change. With the configuration of another
        # adapter, a reader would silently use a wrong alpha.
        last=lambda: (folder / CONFIG_NAME).unlink(missing_ok=True),
    )
    write_atomically(folder / CONFIG_NAME, lambda path: path.write_text(text))
    for other in (names[1], *(() if cores else (CORE_NAME,))):  # of another adapter
        (folder / other).unlink(missing_ok=True)


def _header(
    config: LoraConfig, plan: Plan, injection: Injection, names: Mapping[str, str]
) -> dict[str, Any]:
    """The header from which the initial state of the adapter can be restored."""
    header: dict[str, Any] = {
        "format_version": 1,
        "method": describe(plan.initializer, plan.options),
        "base": plan.initializer.base,
        "config": _with_doubled_ranks(config, plan).to_dict(),
        "quantized_base": plan.quantized_base,
    }
    if injection.replacements:
        header["quantizers"] = {
            names[name]: replacement.quantizer.to_dict()
            for name, replacement in injection.replacements.items()
        }
        header["checksums"] = {names[n]: value for n, value in injection.checksums.items()}
        header["from_original_weights"] = {
            names[n]: value for n, value in injection.from_original_weights.items()
        }
    return header


def _with_doubled_ranks(config: LoraConfig, plan: Plan) -> LoraConfig:
    """Add the ranks and alphas that are doubled because a parameter replaced two modules.

    A reader selects layers by their exact names, which double nothing. The first match wins.
    """
    ranks = PatternValues("rank_pattern", config.rank_pattern, config.r)
    doubled = [target for target in plan.targets if target.rank != ranks(target.selected)]
    if not doubled:
        return config
    keys = {f"^{re.escape(target.selected)}": target for target in doubled}
    return dataclasses.replace(
        config,
        rank_pattern={key: t.rank for key, t in keys.items()} | (config.rank_pattern or {}),
        alpha_pattern={key: t.alpha for key, t in keys.items()} | (config.alpha_pattern or {}),
    )


def _plain_header(config: LoraConfig) -> dict[str, Any]:
    """The header of a portable file, which is a plain adapter of its rank."""
    plain = resolve(True)
    return {
        "format_version": 1,
        "method": describe(*plain),
        "base": plain[0].base,
        "config": config.to_dict(),
    }


def _parts(target: Target, injection: Injection, given: Given, replaced: bool) -> dict[str, Tensor]:
    """The tensors of a layer's adapter, for its original base weight.

    The rank is 2r if the method subtracted from the base. If base weights were replaced, the rank
    is r and the result also contains the factors that are needed to compute the new base.
    """
    layer = injection.layers[target.name]
    parts = {
        part: given.part(target.name, part, getattr(layer, part))
        for part in ("lora_A", "lora_B", "lora_bias", "lora_magnitude_vector")
        if getattr(layer, part) is not None
    }
    if layer.lora_core is not None:
        core = given.part(target.name, "lora_core", layer.lora_core)
        with full_precision():
            parts["lora_B"] = output_factor(parts["lora_B"], core)
    if layer.base_state == "replaced":
        made = injection.replacements[target.name]
        return parts | {"replacement_A": made.lora_A, "replacement_B": made.lora_B}
    if not replaced and layer.base_state not in ("edited", "in_forward"):
        return parts
    initial_A, initial_B = (
        given.part(target.name, part, getattr(layer, part))
        for part in ("initial_lora_A", "initial_lora_B")
    )
    if replaced:
        return parts | {"initial_A": initial_A, "initial_B": initial_B}
    parts["lora_A"], parts["lora_B"] = doubled_rank(
        parts["lora_A"], parts["lora_B"], initial_A, initial_B, target.groups
    )
    return parts


def _copied(
    model: nn.Module, names: Mapping[str, str], besides: Iterable[str], layers: Collection[str]
) -> dict[str, nn.Module]:
    """Other modules that PEFT will treat as fully trained, whose base weights are saved for it."""
    own = {short: name for name, short in names.items()}
    modules: dict[str, nn.Module] = {}
    for name in besides:
        module = model.get_submodule(own[name])
        adapted = any(f"{layer}.".startswith(f"{name}.") for layer in layers)
        if adapted or any(value.is_meta for value in module.state_dict().values()):
            warnings.warn(
                f"PEFT cannot load this adapter: it treats {name!r} as fully trained, since its "
                "name ends like one of modules_to_save. Load it with LoraModel.from_pretrained.",
                stacklevel=4,
            )
        else:
            modules[name] = module
    return modules


def exported_config(config: LoraConfig, plan: Plan, *, doubled: bool = True) -> LoraConfig:
    """The configuration of a plain adapter, with rank 2r if the method subtracts from the base.

    Args:
        config: the settings of the adapter.
        plan: the adapted layers.
        doubled: False for a file that belongs to the changed base, and has rank r.
    """
    written = dataclasses.replace(
        plan.explicit(config),
        init_lora_weights=True,
        eva_config=None,
        corda_config=None,
        loftq_config={},
    )
    written.inference_mode = True
    written.fan_in_fan_out = any(target.module_type == "Conv1D" for target in plan.targets)
    if doubled and plan.initializer.base == "subtract" and not plan.replaced:
        factor = math.sqrt(2) if config.use_rslora else 2
        written.r = 2 * config.r
        written.lora_alpha = config.lora_alpha * factor
        written.rank_pattern = {k: 2 * v for k, v in (written.rank_pattern or {}).items()}
        written.alpha_pattern = {k: v * factor for k, v in (written.alpha_pattern or {}).items()}
    return written
