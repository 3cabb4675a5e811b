"""Save adapters that PEFT, vLLM and llama.cpp load with the same result.

Loaders scale B A differently if a file uses more settings than `r` and `lora_alpha`:

| loader | scaling of a layer |
|---|---|
| PEFT | alpha / r of the layer's patterns, or alpha / sqrt(r) with rsLoRA |
| vLLM | lora_alpha / r, or lora_alpha / sqrt(r): it ignores patterns |
| llama.cpp | lora_alpha over the tensor's rank: it ignores rsLoRA and patterns |

In a portable file, B includes the scaling. All layers have one rank (padded with zeros), and
lora_alpha = r. All three rules then give a scaling of 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_init.config.lora_config import LoraConfig
from lora_init.linalg.matrix import widened
from lora_init.plan.plan import Plan, Target

PORTABLE_TYPES = ("Linear", "Linear4bit", "Linear8bitLt")
"""Module types whose adapters vLLM and llama.cpp load like PEFT."""


def refuse_not_portable(plan: Plan) -> None:
    """Raise if vLLM or llama.cpp could not load all of an adapter.

    Raises:
        ValueError: a setting or a layer is not supported. The message names it.
    """
    if (obstacle := _obstacle(plan)) is not None:
        raise ValueError(
            f"portable=True is not supported with {obstacle}: vLLM and llama.cpp load factors of "
            f"{', '.join(PORTABLE_TYPES)} only. Save without portable, or merge the adapter."
        )


def _obstacle(plan: Plan) -> str | None:
    settings = {
        "use_dora=True": plan.use_dora,
        "lora_bias=True": plan.lora_bias,
        f"bias={plan.bias!r}": bool(plan.trained_biases),
        f"modules_to_save={list(plan.modules_to_save)!r}": bool(plan.modules_to_save),
        f"init_lora_weights={plan.initializer.name!r} on a replaced base": bool(plan.replaced),
    }
    for setting, used in settings.items():
        if used:
            return setting
    for target in plan.targets:
        if target.module_type not in PORTABLE_TYPES:
            return f"the {target.module_type} {target.name!r}"
    return None


def portable_config(config: LoraConfig, rank: int) -> LoraConfig:
    """The configuration of a portable file; its scaling is 1 in every loader."""
    return dataclasses.replace(
        config, r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={}
    )


def portable_factors(lora_A: Tensor, lora_B: Tensor, scaling: float, rank: int) -> tuple:
    """A and s B, zero-padded to `rank`; in float32, so that s B is not rounded to 16 bits."""
    missing = rank - lora_A.shape[0]
    lora_A, lora_B = widened(lora_A), widened(lora_B) * scaling
    return (
        torch.nn.functional.pad(lora_A, (0, 0, 0, missing)),
        torch.nn.functional.pad(lora_B, (0, missing)),
    )


def read_differently(
    plan: Plan, config: LoraConfig, targets: Mapping[str, tuple[int, Target]]
) -> str | None:
    """A warning that names the loaders which scale layers differently; None if all agree.

    The result is also None for files that these loaders cannot load.

    Args:
        plan: the plan of the adapter.
        config: the configuration in the file.
        targets: the rank in the file and the target, by layer name.
    """
    if _obstacle(plan) is not None:
        return None
    root = math.sqrt(config.r) if config.use_rslora else config.r
    vllm = [n for n, (_, t) in targets.items() if not _equal(config.lora_alpha / root, t.scaling)]
    llama = [n for n, (r, t) in targets.items() if not _equal(config.lora_alpha / r, t.scaling)]
    reasons = []
    if vllm:
        reasons.append(f"vLLM ignores rank_pattern and alpha_pattern ({len(vllm)} layers)")
    if llama:
        reasons.append(f"llama.cpp divides lora_alpha by the tensor's rank ({len(llama)} layers)")
    if not reasons:
        return None
    return (
        f"other loaders would scale this adapter differently: {'; '.join(reasons)}. To write a "
        "file that all loaders scale alike, call save_pretrained(folder, portable=True)."
    )


def _equal(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-9)
