"""Find weights that are missing from the checkpoint: a new, random head must be trained whole.

transformers marks every parameter that it reads from a checkpoint. In a model with marks, a
parameter without one was initialized randomly. A model without marks (built from a configuration,
or copied) gives no information.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from lora_init.config.lora_config import LoraConfig
from lora_init.plan.match import name_matches
from lora_init.weights.kinds import is_quantized

MARK = "_is_hf_initialized"


def are_known(model: nn.Module) -> bool:
    """Whether the parameters' marks can be trusted: most parameters must have one."""
    marks = [hasattr(parameter, MARK) for parameter in model.parameters()]
    return 2 * sum(marks) > len(marks)


def is_new(module: nn.Module) -> bool:
    """Whether a module has parameters, all of them floating-point and without a mark."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(
        hasattr(parameter, MARK)
        or parameter.is_meta
        or type(parameter) is not nn.Parameter
        or parameter.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        for parameter in parameters
    )


def with_new_heads(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Add new modules outside the model's backbone to the modules to save.

    A head that `target_modules` lists by name is adapted instead.
    """
    target = config.target_modules
    named = target if isinstance(target, list) else []
    saved = config.modules_to_save or []
    heads = [
        name
        for name in new_modules(model)
        if not _in_backbone(model, name)
        and not any(name_matches(name, entry) for entry in named)
        and not any(name_matches(name, entry) for entry in saved)
    ]
    return dataclasses.replace(config, modules_to_save=[*saved, *heads]) if heads else config


def new_modules(model: nn.Module) -> list[str]:
    """The largest modules whose parameters are all new, except token embeddings."""
    if not are_known(model):
        return []
    embeddings = {id(module) for module in _embeddings(model)}
    return [
        name for name in _largest_new(model, "") if id(model.get_submodule(name)) not in embeddings
    ]


def _largest_new(module: nn.Module, name: str) -> Iterator[str]:
    for part, child in module.named_children():
        path = f"{name}.{part}".removeprefix(".")
        # A list of modules has no forward pass, so it cannot be wrapped by a trained copy.
        callable_ = type(child).forward is not nn.Module.forward
        if callable_ and is_new(child) and not any(map(is_quantized, child.modules())):
            yield path
        else:
            yield from _largest_new(child, path)


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """Input and output embeddings. They are new after a vocabulary resize, but not a head."""
    for name in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model, name, None)
        try:
            found = get() if callable(get) else None
        except (NotImplementedError, AttributeError):
            found = None
        if isinstance(found, nn.Module):
            yield found


def _in_backbone(model: nn.Module, name: str) -> bool:
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and name.startswith(f"{prefix}.")
