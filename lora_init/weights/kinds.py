"""The weight formats by name, and the format of a module.

The class of a module, or the class of its weight tensor, decides, never the dtype.
"""

from __future__ import annotations

from typing import get_args

from jaxtyping import Float
from torch import Tensor, nn

from lora_init.entry_points import EntryPoints
from lora_init.weights.awq import AWQFormat
from lora_init.weights.compressed_tensors import CompressedTensorsFormat
from lora_init.weights.conv1d import Conv1DFormat
from lora_init.weights.convolution import ConvolutionFormat, TransposedConvolutionFormat
from lora_init.weights.embedding import EmbeddingFormat
from lora_init.weights.experts import ExpertsFormat
from lora_init.weights.format import Operation, WeightFormat
from lora_init.weights.fp8_linear import FP8LinearFormat
from lora_init.weights.gptq import GPTQFormat
from lora_init.weights.hqq import HQQFormat
from lora_init.weights.linear import LinearFormat
from lora_init.weights.linear4bit import Linear4bitFormat
from lora_init.weights.linear8bit import Linear8bitFormat
from lora_init.weights.opaque import AQLMFormat, BitNetFormat, EETQFormat
from lora_init.weights.patches import CLASSES, TRANSPOSED
from lora_init.weights.quanto import QuantoFormat
from lora_init.weights.torchao import TorchaoFormat

FORMATS: dict[str, WeightFormat] = {}
"""The registered formats by module type. `register_weight_format` adds one."""

_ENTRY_POINTS = EntryPoints("lora_init.weight_formats")


def register_weight_format(one: WeightFormat) -> None:
    """Add a format. A module that several formats match has the one that was added last.

    Other packages name the module that calls this in the entry-point group
    ``lora_init.weight_formats``.

    Raises:
        TypeError: `one` is not an instance of a subclass of `WeightFormat`.
        ValueError: another format has the same name, or `one.operation` is unknown.
    """
    if not isinstance(one, WeightFormat):
        raise TypeError(
            f"weight format {one!r} is not supported: must be an instance of a subclass of "
            "lora_init.weights.format.WeightFormat. Pass an instance, as in MyFormat()."
        )
    if one.operation not in get_args(Operation):
        raise ValueError(
            f"operation={one.operation!r} of the weight format {one.name!r} is not supported: "
            f"must be one of {', '.join(get_args(Operation))}. Correct it in the class."
        )
    if one.name in FORMATS:
        raise ValueError(
            f"name={one.name!r} is not supported: must be a new name, because "
            f"{type(FORMATS[one.name]).__name__} has this one. Choose another name."
        )
    FORMATS[one.name] = one


for _one in (
    LinearFormat(), Conv1DFormat(), Linear4bitFormat(), Linear8bitFormat(),
    *map(ConvolutionFormat, CLASSES.values()),
    *map(TransposedConvolutionFormat, TRANSPOSED.values()),
    EmbeddingFormat(), TorchaoFormat(), QuantoFormat(), CompressedTensorsFormat(),
    FP8LinearFormat(), HQQFormat(), AQLMFormat(), EETQFormat(), BitNetFormat(), GPTQFormat(),
    AWQFormat(), ExpertsFormat(),
):  # fmt: skip
    register_weight_format(_one)


def weight_formats() -> dict[str, WeightFormat]:
    """All formats by module type, including those of other packages."""
    _ENTRY_POINTS.load()
    return FORMATS


def class_format(module: nn.Module) -> WeightFormat | None:
    """The format of the module's class, also if the module cannot have an adapter."""
    formats = reversed(weight_formats().values())
    return next((one for one in formats if one.matches(module)), None)


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
