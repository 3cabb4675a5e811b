"""Weights of HQQ layers: integers of 1 to 8 bits with a scale and a zero point per group.

Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"; hqq's
`HQQLinear`. Groups lie along the outputs (axis 0) or the inputs (axis 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights.format import WEIGHT, register_weight_format
from lora_init.weights.read_only import ReadOnlyFormat


class HQQLayer(Protocol):
    """What is read of a layer; `meta` is None before it is quantized."""

    meta: dict[str, Any]
    compute_dtype: torch.dtype
    dequantize: Callable[[], Tensor]


class HQQFormat(ReadOnlyFormat):
    """hqq's HQQLinear, recognized by its class name."""

    name = "HQQLinear"

    def shape(self, module: nn.Module, name: str = WEIGHT) -> tuple[int, int]:
        rows, columns = cast(HQQLayer, module).meta["shape"]
        return rows, columns

    def refusal(self, module: nn.Module) -> str | None:
        if module.meta is None:
            return "is an HQQLinear that is not quantized yet: quantize it first"
        return None

    def values(self, module: nn.Module) -> Float[Tensor, "out in"]:
        # The values in the compute dtype, by which the module multiplies.
        return cast(HQQLayer, module).dequantize()

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        return cast(HQQLayer, module).compute_dtype

    def describe(self, module: nn.Module) -> str:
        meta = cast(HQQLayer, module).meta
        return f"hqq {meta['nbits']:g} bits/{meta['group_size']} axis {meta['axis']}"


register_weight_format(HQQFormat())
