"""Names and scalings in the adapter file of diffusers, `pytorch_lora_weights.safetensors`.

Keys are ``<component>.<module>.lora_A.weight``; the component is that of a pipeline, such as "unet"
or "transformer". diffusers 0.42 finds the scaling in one of three places:

- The header has the configuration of PEFT (``lora_adapter_metadata``).
- ``<module>.alpha`` divided by the rank. Only some pipelines (Flux) read it next to keys of PEFT. A
  UNet and Wan take such a key for an unknown tensor.
- Else the scaling is 1, in every pipeline and version.

Files of all three kinds are read; `lora_init.adapters.diffusers_file` writes the last one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_init.adapters.format import PREFIX

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2")
FACTORS = {
    ".lora.down.weight": ".lora_A.weight",
    ".lora.up.weight": ".lora_B.weight",
    ".lora_linear_layer.down.weight": ".lora_A.weight",
    ".lora_linear_layer.up.weight": ".lora_B.weight",
}
"""Endings of keys in older files, and those of PEFT."""
OTHER_PROGRAMS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "diffusion_model.")
"""Beginnings of keys in files of kohya's scripts and of the models' authors."""


def component_of(model: nn.Module) -> str:
    """The component that holds such a model in most pipelines."""
    kinds = {"UNet": "unet", "Transformer": "transformer", "Text": "text_encoder"}
    name = type(model).__name__
    return next((component for part, component in kinds.items() if part in name), "transformer")


def as_peft(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], base: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of PEFT that a file of diffusers means.

    Args:
        tensors, metadata: of the file.
        base: the model to load it into, by which a component is chosen if the file has several.

    Raises:
        ValueError: the file is of another program, or has nothing for this model.
    """
    component = _component(tensors, base)
    named: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, value in tensors.items():
        if not key.startswith(component):
            continue
        key = key.removeprefix(component)
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(value)
            continue
        for former, present in FACTORS.items():
            if key.endswith(former):
                key = key.removesuffix(former) + present
        if "lora_down" in key or "processor" in key:
            raise ValueError(_other_program(key))
        named[PREFIX + key] = value
    values = json.loads(metadata.get(METADATA_KEY, "{}"))
    values = {
        key.removeprefix(component): value
        for key, value in values.items()
        if key.startswith(component)
    }
    return named, values or _inferred(named, alphas)


def _component(keys: Collection[str], base: nn.Module) -> str:
    """The beginning of the keys of a model, with its dot; empty in a file of a single model."""
    foreign = next((key for key in keys if key.startswith(OTHER_PROGRAMS)), None)
    if foreign is not None:
        raise ValueError(_other_program(foreign))
    found = sorted({first for key in keys if (first := key.partition(".")[0]) in COMPONENTS})
    children = dict(base.named_children())
    found = [component for component in found if component not in children]
    if len(found) > 1 and component_of(base) in found:
        found = [component_of(base)]
    if len(found) > 1:
        raise ValueError(
            f"the file holds adapters of {', '.join(found)}, and none of these names is known for "
            f"a {type(base).__name__}. Load it with diffusers, and save the part of one model by "
            "save_lora_adapter"
        )
    return f"{found[0]}." if found else ""


def _other_program(key: str) -> str:
    return (
        f"the file contains {key!r}, a name of kohya's scripts or of a model's authors, which is "
        "not supported: must be diffusers' names. Load the file with diffusers "
        "(pipeline.load_lora_weights), and save it by save_lora_adapter"
    )


def _inferred(tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The configuration of a file without one: alpha is the rank, unless a tensor states it."""
    ending = ".lora_A.weight"
    ranks = {
        key.removeprefix(PREFIX).removesuffix(ending): value.shape[0]
        for key, value in tensors.items()
        if key.endswith(ending)
    }
    if not ranks:
        raise ValueError("the adapter file contains no lora_A: it is damaged or not a LoRA adapter")
    found = {name: alphas.get(name, float(rank)) for name, rank in ranks.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(found.values())
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": _exceptions(ranks, rank),
        "alpha_pattern": _exceptions(found, alpha),
        "use_dora": any(key.endswith("lora_magnitude_vector") for key in tensors),
        "lora_bias": any(key.endswith(".lora_B.bias") for key in tensors),
    }


def _exceptions(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != common}


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
