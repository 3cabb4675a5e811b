"""Classes of one family, one for each class of base models.

Tools read a model's signature to know its inputs: transformers' Trainer drops the columns that it
does not name, finds the labels in it (of the class, not the instance), and decides by it how a loss
is averaged over accumulated batches. A wrapper's ``forward(*args, **kwargs)`` tells them nothing.
"""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any

from torch import nn

from lora_init.model.pretrained import base_attributes, pretrained_class


@functools.cache
def with_forward_of(family: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `family` whose forward has the signature and the docstring of `base`'s.

    The same class at every call; `family` itself where `base` has no signature to show (TorchScript
    modules). Its name holds the base's, in which Trainer looks for "QuestionAnswering". On a model
    of transformers it is a `PreTrainedModel`: see `lora_init.model.pretrained`.
    """
    try:
        signature = inspect.signature(base.forward)
    except (TypeError, ValueError):
        return family

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return family.forward(self, *args, **kwargs)

    forward.__signature__ = signature
    forward.__doc__ = base.forward.__doc__
    name = f"{family.__name__}[{base.__name__}]"
    own = {"forward": forward, "__module__": family.__module__, "__doc__": family.__doc__}
    own["family"] = family
    pretrained = pretrained_class(base)
    if pretrained is None:
        return type(family)(name, (family,), own)
    own = base_attributes(family, base, pretrained) | own
    return type(family)(name, (family, pretrained), own)


def bound_to_base(method: Any, model: nn.Module, base: nn.Module) -> Any:
    """What becomes of a `forward` that a tool sets on `model`.

    Tools such as TRL replace a model's forward by a function that expects the attributes of the
    base model's class. A method of `model` is therefore bound to `base`, unless it only wraps the
    forward that `model` has.
    """
    if not isinstance(method, MethodType) or method.__self__ is not model:
        return method
    function = method.__func__
    while _defined_in(function) in ("torch", "accelerate") and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    own = {cls.__dict__.get("forward") for cls in type(model).__mro__}
    return method if function in own else MethodType(method.__func__, base)


def _defined_in(function: Any) -> str:
    """The package whose code `function` is; `functools.wraps` changes its `__module__`."""
    module = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
    return module.partition(".")[0]


def blank(family: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    """An instance without state, for pickle: the classes made here have no place to be found at."""
    cls = with_forward_of(family, base)
    return cls.__new__(cls)
