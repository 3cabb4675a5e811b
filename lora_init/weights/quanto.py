"""Weights of optimum-quanto's layers: int8, int4, int2 or float8 with scales per row or group.

Source: optimum-quanto's `QLinear`. Before `freeze`, it keeps the float weight and quantizes that in
every forward pass. Reading gives the quantized values, by which the module multiplies.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights.format import class_names, register_weight_format
from lora_init.weights.read_only import ReadOnlyFormat


class QuantoFormat(ReadOnlyFormat):
    """optimum-quanto's QLinear, recognized by its class name."""

    name = "QLinear"

    def matches(self, module: nn.Module) -> bool:
        quantizes = getattr(module, "weight_qtype", None) is not None
        return quantizes and self.name in class_names(module)

    def values(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return module.qweight.dequantize()

    def describe(self, module: nn.Module) -> str:
        inputs = module.activation_qtype
        return f"quanto {module.weight_qtype.name}" + (f" inputs {inputs.name}" if inputs else "")


register_weight_format(QuantoFormat())
