"""Weights of optimum-quanto's layers: int8, int4, int2 or float8 with scales per row or group.

Source: optimum-quanto's `QLinear`. Before `freeze`, it keeps the float weight and quantizes that in
every forward pass. Reading gives the quantized values, by which the module multiplies.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights.format import register_weight_format
from lora_init.weights.read_only import ReadOnlyFormat


class QuantoLayer(Protocol):
    """What is read of a layer. A `qtype` of quanto has a name."""

    qweight: Tensor
    weight_qtype: Any
    activation_qtype: Any


class QuantoFormat(ReadOnlyFormat):
    """optimum-quanto's QLinear, recognized by its class name."""

    name = "QLinear"

    def matches(self, module: nn.Module) -> bool:
        return super().matches(module) and getattr(module, "weight_qtype", None) is not None

    def values(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return cast(QuantoLayer, module).qweight.dequantize()

    def describe(self, module: nn.Module) -> str:
        layer = cast(QuantoLayer, module)
        inputs = layer.activation_qtype
        return f"quanto {layer.weight_qtype.name}" + (f" inputs {inputs.name}" if inputs else "")


register_weight_format(QuantoFormat())
