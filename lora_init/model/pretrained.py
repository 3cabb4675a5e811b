"""A LoraModel on a transformers model is a `PreTrainedModel` itself.

transformers' Trainer calls `save_pretrained` on a `PreTrainedModel` only. Of any other module it
stores the state dict, without the adapter's configuration. The class is inherited from, and what it
defines is the base model's: its methods would find none of their attributes on the wrapper.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

TRAINING_STATE_NAME = "model.safetensors"
"""The file from which Trainer resumes."""


def pretrained_class(base: type[nn.Module]) -> type[nn.Module] | None:
    """transformers' `PreTrainedModel`, where `base` is a subclass; transformers is not imported."""
    for cls in base.__mro__:
        if (cls.__module__, cls.__name__) == ("transformers.modeling_utils", "PreTrainedModel"):
            return cls
    return None


def base_attributes(
    family: type[nn.Module], base: type[nn.Module], pretrained: type[nn.Module]
) -> dict[str, Any]:
    """What a subclass of `family` and `pretrained` defines, so that `pretrained` adds nothing."""
    attributes: dict[str, Any] = {}
    inherited = set(dir(family))
    for cls in pretrained.__mro__:
        if cls in nn.Module.__mro__:
            continue
        for name in vars(cls):
            if name.startswith("__"):
                continue
            if name in inherited:
                attributes[name] = inspect.getattr_static(family, name)
            else:
                attributes[name] = _OfTheBase(base, name)
    attributes["base_model"] = property(_base_model)
    attributes["save_pretrained"] = _saving_for_trainers(family.save_pretrained)
    return attributes


def _saving_for_trainers(save: Callable[..., None]) -> Callable[..., None]:
    """`save_pretrained` that also writes the file from which Trainer resumes.

    The adapter's files are for the original base. Only the state dict continues a training run to
    the bit. Trainer is known by the state dict that it passes, though it may be None.
    """

    @functools.wraps(save)
    def save_pretrained(self: nn.Module, folder: str | Path, *args: Any, **kwargs: Any) -> None:
        save(self, folder, *args, **kwargs)
        if "state_dict" in kwargs and kwargs.get("is_main_process", True):
            state = kwargs["state_dict"]
            state = self.state_dict() if state is None else state
            path = Path(folder) / TRAINING_STATE_NAME
            state = {key: value.contiguous() for key, value in state.items()}
            save_file(state, path, metadata={"format": "pt"})

    return save_pretrained


class _OfTheBase:
    """An attribute that the base model has; one that is set on the instance comes first."""

    def __init__(self, base: type[nn.Module], name: str) -> None:
        self.base = base
        self.name = name

    def __get__(self, instance: nn.Module | None, owner: type[nn.Module]) -> Any:
        return getattr(self.base if instance is None else instance.base_model, self.name)


def _base_model(model: nn.Module) -> nn.Module:
    try:
        return model._modules["base_model"]
    except KeyError:
        raise AttributeError("base_model") from None
