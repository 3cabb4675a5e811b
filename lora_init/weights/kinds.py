"""The weight formats by name, and the format of a module.

The class of a module, or the class of its weight tensor, decides, never the dtype.
"""

from __future__ import annotations

from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.entry_points import import_modules
from lora_init.weights.format import (
    FORMATS,
    WeightFormat,
    register_weight_format,
    weight_formats,
)
from lora_init.weights.linear import LinearFormat

_KNOWN: WeakKeyDictionary[nn.Module, tuple[Hashable, WeightFormat | None]] = WeakKeyDictionary()

# Quantizers derive their classes from nn.Linear. Its format is the first, so others precede it.
register_weight_format(LinearFormat())


def class_format(module: nn.Module) -> WeightFormat | None:
    """The format of the module's class, also if the module cannot have an adapter.

    It is remembered until the module has other attributes or parameters, or a format is added.
    """
    formats = weight_formats()
    if torch.compiler.is_compiling():
        return _first_match(module, formats)
    state = _state(module), len(formats), next(reversed(formats))
    known = _KNOWN.get(module)
    if known is None or known[0] != state:
        known = _KNOWN[module] = state, _first_match(module, formats)
    return known[1]


def _first_match(module: nn.Module, formats: dict[str, WeightFormat]) -> WeightFormat | None:
    return next((one for one in reversed(formats.values()) if one.matches(module)), None)


def _state(module: nn.Module) -> Hashable:
    """What changes if a quantizer changes the module in place."""
    parameters = [
        (name, type(one), None if one is None else one.shape)
        for name, one in module._parameters.items()
    ]
    buffers = tuple(module._buffers.keys())
    return type(module), len(vars(module)), buffers, tuple(parameters)


def weight_format(module: nn.Module) -> WeightFormat | None:
    """The format of a module that can have an adapter; None for others.

    `refusal` of its `class_format` has the reason.
    """
    found = class_format(module)
    return None if found is None or found.refusal(module) is not None else found


def known_format(module: nn.Module) -> WeightFormat:
    """The format of a module that has an adapter, or has been checked before it gets one.

    Raises:
        TypeError: the module's class has no format.
    """
    found = class_format(module)
    if found is None:
        raise TypeError(
            f"a {type(module).__name__} is not supported: must be one of {', '.join(FORMATS)}"
        )
    return found


def module_type(module: nn.Module) -> str:
    """The name of the module's format, or else of its class."""
    found = weight_format(module)
    return type(module).__name__ if found is None else found.name


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes products with a supported weight, as "all-linear" selects."""
    return getattr(weight_format(module), "operation", None) == "product"


def is_router(module: nn.Module) -> bool:
    """Whether the module is a router with a supported weight."""
    return getattr(weight_format(module), "operation", None) == "selection"


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's class stores a quantized weight."""
    found = class_format(module)
    return found is not None and found.quantized


def oriented_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a module that has one matrix, as (out, in)."""
    return known_format(module).read(module)


# At the end, because modules of the package import this one.
import_modules("lora_init.weights")
