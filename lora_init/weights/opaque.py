"""Quantized linear layers whose values only their own kernels read.

Methods that draw random factors and methods that read inputs support them. All others are refused
by name.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_init.weights.format import WEIGHT, register_weight_format, sizes
from lora_init.weights.offload import stored_weight
from lora_init.weights.read_only import ReadOnlyFormat


class OpaqueFormat(ReadOnlyFormat):
    """A packed linear layer, recognized by its class name."""

    readable = False

    def opaque(self, module: nn.Module) -> str | None:
        return "only its own kernel can dequantize it"

    def values(self, module: nn.Module) -> Tensor:
        raise NotImplementedError

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the first float tensor of 16 bits or more, such as the module's scales."""
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        wide = (one.dtype for one in own if one.is_floating_point() and one.itemsize > 1)
        return next(wide, torch.float16)

    def describe(self, module: nn.Module) -> str:
        return self.name.lower()


class AQLMFormat(OpaqueFormat):
    """Additive codebooks (Egiazarian et al. 2024, arXiv 2401.06118)."""

    name = "AQLM"
    classes: ClassVar = {"QuantizedLinear", "AqlmLinear"}


register_weight_format(AQLMFormat())


class EETQFormat(OpaqueFormat):
    """int8 codes (in, out) in the order of EETQ's kernels. transformers' layers state no sizes."""

    name = "EETQ"
    classes: ClassVar = {"EetqLinear", "W8A16Linear"}

    def shape(self, module: nn.Module, name: str = WEIGHT) -> tuple[int, int]:
        if hasattr(module, "out_features"):
            return sizes(module)
        columns, rows = stored_weight(module).shape
        return rows, columns


register_weight_format(EETQFormat())


class BitNetFormat(OpaqueFormat):
    """Ternary codes (Ma et al. 2024, arXiv 2402.17764)."""

    name = "BitNet"
    classes: ClassVar = {"BitLinear", "AutoBitLinear"}


register_weight_format(BitNetFormat())


class INCFormat(OpaqueFormat):
    """float8 values in the layout of Intel Neural Compressor's kernels for Gaudi."""

    name = "INC"
    classes: ClassVar = {"PatchedLinear"}


register_weight_format(INCFormat())
