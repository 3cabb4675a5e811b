"""Weights of bitsandbytes' Linear8bitLt: int8 codes and one scale per row."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from lora_init.quantization.quantizer import Quantized, Quantizer
from lora_init.weights.bitsandbytes import PackedFormat, bitsandbytes_parameter, unquantized
from lora_init.weights.format import WEIGHT, Held, register_weight_format


class Layer8bit(Protocol):
    """What is used of a layer: bitsandbytes' parameter with CB and SCB, and its state."""

    weight: Any
    bias: Tensor | None
    state: Any


class Linear8bitFormat(PackedFormat):
    """Linear8bitLt. Its first forward moves codes and scales from the weight to its state."""

    name = "Linear8bitLt"

    def quantizer(self, module: nn.Module) -> Quantizer:
        self.codes_and_scale(module)
        return Quantizer("int8", 8)

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        """The module does not record it: the dtype of its bias, or float16 as in bitsandbytes."""
        bias = cast(Layer8bit, module).bias
        return torch.float16 if bias is None else bias.dtype

    def changes_in_forward(self, module: nn.Module) -> bool:
        return cast(Layer8bit, module).weight.dtype == torch.int8

    def hold(self, module: nn.Module, name: str = WEIGHT, *, on_cpu: bool = False) -> Held:
        self.codes_and_scale(module)
        layer = cast(Layer8bit, module)
        weight, state = layer.weight, layer.state
        return Held(weight, weight.data, name, (weight.CB, weight.SCB, state.CB, state.SCB))

    def put_back(self, module: nn.Module, held: Held) -> None:
        layer, parameter = cast(Layer8bit, module), cast(Any, held.parameter)
        parameter.data = held.data.to(layer.weight.device)
        layer.weight = parameter
        moved = [_moved(value, held.data, parameter.data) for value in held.state]
        parameter.CB, parameter.SCB, layer.state.CB, layer.state.SCB = moved

    def store(self, module: nn.Module, quantized: Quantized) -> None:
        layer, parameter = cast(Layer8bit, module), bitsandbytes_parameter("Int8Params")
        codes, scale = quantized.codes, quantized.scale
        layer.weight = parameter(codes, requires_grad=False, CB=codes, SCB=scale)
        # The next forward moves CB and SCB from the weight to the state.
        layer.state.CB = layer.state.SCB = None

    def codes_and_scale(
        self, module: nn.Module
    ) -> tuple[Int8[Tensor, "out in"], Float[Tensor, " out"]]:
        """The codes and scales, before or after the first forward."""
        layer = cast(Layer8bit, module)
        weight, state = layer.weight, layer.state
        if state.has_fp16_weights:
            fix = "build it with has_fp16_weights=False, then model.to(device)"
            raise unquantized(module, fix)
        on_weight = getattr(weight, "CB", None) is not None
        codes = weight.CB if on_weight else state.CB if state.CB is not None else weight.data
        scale = weight.SCB if on_weight else state.SCB
        if codes.dtype != torch.int8 or scale is None:
            raise unquantized(module)
        return codes, scale


register_weight_format(Linear8bitFormat())


def _moved(value: Tensor | None, codes: Tensor, codes_there: Tensor) -> Tensor | None:
    """Move part of the state to the module's device; codes share the weight's memory."""
    if value is None:
        return None
    return codes_there if value.data_ptr() == codes.data_ptr() else value.to(codes_there.device)
