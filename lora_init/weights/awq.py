"""Weights of AWQ layers: 4-bit integers, with a scale and a zero point per group of inputs.

W[j, i] = scales[g, j] · (q[i, j] - zero[g, j]) with g = i // group.

| layout | integers | packed along |
|---|---|---|
| GEMM | (in, out) | the outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7 |
| GEMV | (out, in) | the inputs, in their order; padded groups |

Sources: Lin et al. 2023 (arXiv 2306.00978); the layouts of AutoAWQ and GPT-QModel.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights.format import class_names, register_weight_format
from lora_init.weights.gptq import reordering_kernel
from lora_init.weights.packed_integers import unpacked
from lora_init.weights.read_only import ReadOnlyFormat

BITS = 4
CLASSES = {"AWQuantLinear", "WQLinear_GEMM", "WQLinear_GEMV"}
OTHER_LAYOUTS = {"WQLinear_GEMVFast", "WQLinear_Marlin", "WQLinear_Exllama", "WQLinear_ExllamaV2",
                 "WQLinear_IPEX", "AwqGEMVFastLinear", "AwqGEMVFastQuantLinear"}  # fmt: skip
# The position of each output within a packed word of the GEMM layout.
POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)


class AWQLayer(Protocol):
    """What is read of a layer. Its bits are `w_bit` in AutoAWQ and `bits` in GPT-QModel."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    in_features: int
    group_size: int
    bits: int


class AWQFormat(ReadOnlyFormat):
    """The linear layers of AutoAWQ and GPT-QModel's AWQ layers, recognized by their class names."""

    name = "AWQ"

    def matches(self, module: nn.Module) -> bool:
        names = class_names(module)
        of_awq = any(name.startswith("Awq") for name in names) and "BaseQuantLinear" in names
        return bool(names & (CLASSES | OTHER_LAYOUTS)) or of_awq

    def opaque(self, module: nn.Module) -> str | None:
        if class_names(module) & OTHER_LAYOUTS:
            return f"the layout of a {type(module).__name__} is not known; use the GEMM version"
        if (reason := reordering_kernel(module)) is not None:
            return reason
        if _bits(module) != BITS:
            return f"it has {_bits(module)} bits, and AWQ layers of {BITS} bits are supported"
        return None

    def values(self, module: nn.Module) -> Float[Tensor, "out in"]:
        layer = cast(AWQLayer, module)
        if "gemv" not in type(module).__name__.lower():
            codes, zeros = (_interleaved(part).T for part in (layer.qweight, layer.qzeros))
            scales = layer.scales.float().T
        else:
            codes, zeros = unpacked(layer.qweight, BITS), unpacked(layer.qzeros, BITS)
            scales = layer.scales.float()
        group = torch.arange(layer.in_features, device=codes.device) // _group_size(module)
        return (codes - zeros[:, group]) * scales[:, group]

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        return cast(AWQLayer, module).scales.dtype

    def describe(self, module: nn.Module) -> str:
        return f"awq {_bits(module)} bits/{_group_size(module)}"


register_weight_format(AWQFormat())


def _interleaved(words: Tensor) -> Tensor:
    """The integers of each row of a GEMM layout, in the order of the outputs."""
    codes = unpacked(words, BITS)
    return codes.unflatten(1, (-1, len(POSITIONS)))[..., POSITIONS].flatten(1)


def _bits(module: nn.Module) -> int:
    return getattr(module, "w_bit", None) or cast(AWQLayer, module).bits


def _group_size(module: nn.Module) -> int:
    layer = cast(AWQLayer, module)
    return layer.in_features if layer.group_size == -1 else layer.group_size
