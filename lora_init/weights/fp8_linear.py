"""Weights of transformers' FP8Linear: float8 values with one scale per block of rows and columns.

W[j, i] = weight[j, i] · weight_scale_inv[j // rows, i // columns], or one scale for all values.

Source: transformers' fine-grained FP8 integration, the layout of DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights.format import register_weight_format
from lora_init.weights.read_only import ReadOnlyFormat


class FP8Layer(Protocol):
    """What is read of a layer; `block_size` is None for one scale."""

    weight: Tensor
    weight_scale_inv: Tensor
    bias: Tensor | None
    block_size: tuple[int, int] | None


class FP8LinearFormat(ReadOnlyFormat):
    """transformers' FP8Linear, recognized by its class name."""

    name = "FP8Linear"

    def values(self, module: nn.Module) -> Float[Tensor, "out in"]:
        layer = cast(FP8Layer, module)
        weight = layer.weight.float()
        if layer.weight.element_size() > 1:  # loaded without quantization
            return weight
        scale = layer.weight_scale_inv.float()
        if layer.block_size is not None:
            rows, columns = (
                torch.arange(size, device=scale.device) // block
                for size, block in zip(weight.shape, layer.block_size, strict=True)
            )
            scale = scale[rows[:, None], columns]
        return weight * scale

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        """The module does not record it: the dtype of its bias, or bfloat16 as in transformers."""
        bias = cast(FP8Layer, module).bias
        return torch.bfloat16 if bias is None else bias.dtype

    def describe(self, module: nn.Module) -> str:
        block = cast(FP8Layer, module).block_size
        return "fp8" if block is None else f"fp8/{'×'.join(map(str, block))}"


register_weight_format(FP8LinearFormat())
