"""Classes of one family that differ in the signature of `forward` only.

Tools read a model's signature to know its inputs: transformers' Trainer drops the columns that it
does not name, finds the labels in it (of the class, not the instance), and decides by it how a loss
is averaged over accumulated batches. A wrapper's ``forward(*args, **kwargs)`` tells them nothing.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


@functools.cache
def with_forward_of(family: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `family` whose forward has the signature and the docstring of `base`'s.

    The same class at every call; `family` itself where `base` has no signature to show (TorchScript
    modules). Its name holds the base's, in which Trainer looks for "QuestionAnswering".
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
    return type(family)(name, (family,), own | {"family": family})


def blank(family: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    """An instance without state, for pickle: the classes made here have no place to be found at."""
    cls = with_forward_of(family, base)
    return cls.__new__(cls)
