"""Quantized linear layers whose values only their own kernels read.

Methods that draw random factors and methods that read inputs support them. All others are refused
by name.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_init.weights.format import class_names, register_weight_format
from lora_init.weights.read_only import ReadOnlyFormat


class OpaqueFormat(ReadOnlyFormat):
    """A packed linear layer, recognized by its class name.

    Attributes:
        classes: the names of its classes.
    """

    classes: ClassVar[set[str]]
    readable = False

    def matches(self, module: nn.Module) -> bool:
        return bool(class_names(module) & self.classes)

    def opaque(self, module: nn.Module) -> str | None:
        return "only its own kernel can dequantize it"

    def values(self, module: nn.Module) -> Tensor:
        raise NotImplementedError

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the first float tensor of the module, such as its scales."""
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        return next((one.dtype for one in own if one.is_floating_point()), torch.float16)

    def describe(self, module: nn.Module) -> str:
        return self.name.lower()


class AQLMFormat(OpaqueFormat):
    """Additive codebooks (Egiazarian et al. 2024, arXiv 2401.06118)."""

    name = "AQLM"
    classes: ClassVar = {"QuantizedLinear", "AqlmLinear"}


register_weight_format(AQLMFormat())


class EETQFormat(OpaqueFormat):
    """int8 codes in the order of EETQ's kernels."""

    name = "EETQ"
    classes: ClassVar = {"EetqLinear", "W8A16Linear"}


register_weight_format(EETQFormat())


class BitNetFormat(OpaqueFormat):
    """Ternary codes (Ma et al. 2024, arXiv 2402.17764)."""

    name = "BitNet"
    classes: ClassVar = {"BitLinear", "AutoBitLinear"}


register_weight_format(BitNetFormat())
