"""Make a LoraModel of a transformers model a `PreTrainedModel`.

transformers' Trainer calls `save_pretrained` on a `PreTrainedModel` only. For other modules it
stores the state dict without the adapter's configuration. The LoraModel therefore inherits from
`PreTrainedModel`, but takes all attributes of that class from the base model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn

if TYPE_CHECKING:
    from lora_init.model.lora_model import LoraModel

TRAINING_STATE_NAME = "model.safetensors"
"""The file from which Trainer resumes a run."""


def pretrained_class(base: type[nn.Module]) -> type[nn.Module] | None:
    """`PreTrainedModel` if `base` is a subclass of it, else None; does not import transformers."""
    for cls in base.__mro__:
        if (cls.__module__, cls.__name__) == ("transformers.modeling_utils", "PreTrainedModel"):
            return cls
    return None


def base_attributes(
    family: type[LoraModel], base: type[nn.Module], pretrained: type[nn.Module]
) -> dict[str, Any]:
    """The attributes of a subclass of `family` and `pretrained` that hide those of `pretrained`."""
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
    """Wrap `save_pretrained` so that it also writes the file from which Trainer resumes.

    The adapter's files belong to the original base. Only the state dict resumes a run bit for bit.
    Only trainers pass the argument `state_dict`, which may be None.
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
    """An attribute that is read from the base model, unless it is set on the instance."""

    def __init__(self, base: type[nn.Module], name: str) -> None:
        self.base = base
        self.name = name

    def __get__(self, instance: nn.Module | None, owner: type[nn.Module]) -> Any:
        return getattr(self.base if instance is None else instance.base_model, self.name)


def _base_model(model: nn.Module) -> nn.Module | None:
    try:
        return model._modules["base_model"]
    except KeyError:
        raise AttributeError("base_model") from None
