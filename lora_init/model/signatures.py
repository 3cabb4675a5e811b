"""Create a subclass of LoraModel for each class of base models, with its `forward` signature.

transformers' Trainer reads the signature of a model's class. It drops data columns that the
signature does not name, and finds the labels in it. It also decides from it how to average a loss
over accumulated batches. ``forward(*args, **kwargs)`` would not work there.
"""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_init.model.pretrained import base_attributes, pretrained_class

if TYPE_CHECKING:
    from lora_init.model.lora_model import LoraModel


@functools.cache
def with_forward_of(family: type[LoraModel], base: type[nn.Module]) -> type[LoraModel]:
    """The subclass of `family` whose `forward` has the signature and docstring of `base.forward`.

    Each call returns the same class. Its name contains the name of `base`, in which Trainer looks
    for "QuestionAnswering". For models of transformers it is also a `PreTrainedModel`, see
    `lora_init.model.pretrained`. If `base.forward` has no signature (TorchScript), `family` is
    returned.
    """
    try:
        signature = inspect.signature(base.forward)
    except (TypeError, ValueError):
        return family

    def forward(self: LoraModel, *args: Any, **kwargs: Any) -> Any:
        return family.forward(self, *args, **kwargs)

    forward.__signature__ = signature
    forward.__doc__ = base.forward.__doc__
    name = f"{family.__name__}[{base.__name__}]"
    own = {"forward": forward, "__module__": family.__module__, "__doc__": family.__doc__}
    own["family"] = family
    metaclass: Any = type(family)
    pretrained = pretrained_class(base)
    if pretrained is None:
        return metaclass(name, (family,), own)
    own = base_attributes(family, base, pretrained) | own
    return metaclass(name, (family, pretrained), own)


def bound_to_base(method: Any, model: nn.Module, base: nn.Module) -> Any:
    """Bind a `forward` that a tool sets on `model` to the base model.

    Tools such as TRL replace `forward` with a function that expects the attributes of the base
    model's class. A method of `model` is therefore bound to `base`. It is returned unchanged if it
    only wraps the existing `forward` of `model`.
    """
    if not isinstance(method, MethodType) or method.__self__ is not model:
        return method
    function = method.__func__
    while _defined_in(function) in ("torch", "accelerate") and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    own = {cls.__dict__.get("forward") for cls in type(model).__mro__}
    return method if function in own else MethodType(method.__func__, base)


def _defined_in(function: Any) -> str:
    """The package that defines `function`, even if `functools.wraps` changed its `__module__`."""
    module = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
    return module.partition(".")[0]


def blank(family: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    """Create an instance without state, for pickle, which cannot import the classes made here."""
    cls = with_forward_of(family, base)
    return cls.__new__(cls)
