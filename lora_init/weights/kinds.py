"""The weight formats by name, and the format of a module.

The class of a module, or the class of its weight tensor, decides, never the dtype.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights.conv1d import Conv1DFormat
from lora_init.weights.conv2d import Conv2dFormat
from lora_init.weights.embedding import EmbeddingFormat
from lora_init.weights.experts import ExpertsFormat
from lora_init.weights.format import WeightFormat
from lora_init.weights.linear import LinearFormat
from lora_init.weights.linear4bit import Linear4bitFormat
from lora_init.weights.linear8bit import Linear8bitFormat

FORMATS: dict[str, WeightFormat] = {}
"""The formats by module type, in the order of `MODULE_TYPES`. `register` adds one."""


def register(one: WeightFormat) -> None:
    """Add a format. A module that several formats match has the one that was added last.

    Raises:
        ValueError: another format has the same name.
    """
    if one.name in FORMATS:
        raise ValueError(
            f"name={one.name!r} is not supported: must be a new name, because "
            f"{type(FORMATS[one.name]).__name__} has this one. Choose another name."
        )
    FORMATS[one.name] = one


for _one in (
    LinearFormat(), Conv1DFormat(), Linear4bitFormat(), Linear8bitFormat(), Conv2dFormat(),
    EmbeddingFormat(), ExpertsFormat(),
):  # fmt: skip
    register(_one)


def class_format(module: nn.Module) -> WeightFormat | None:
    """The format of the module's class, also if the module cannot have an adapter."""
    return next((one for one in reversed(FORMATS.values()) if one.matches(module)), None)


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
    found = weight_format(module)
    return found is not None and found.operation == "product"


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's class stores a quantized weight."""
    found = class_format(module)
    return found is not None and found.quantized


def oriented_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a module that has one matrix, as (out, in)."""
    return known_format(module).read(module)
