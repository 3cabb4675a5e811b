"""Linear layers whose weight is a tensor subclass of torchao: int8, int4, float8, with or without
quantized inputs.

Sources: torchao's `quantize_`, whose configurations replace the weight and keep the module's class.

Deviations:
    - A subclass without `dequantize`, such as some int4 layouts, is read by multiplying it with the
      identity matrix. Its kernel rounds the result to the module's dtype.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_init.weights.read_only import ReadOnlyFormat


class TorchaoFormat(ReadOnlyFormat):
    """nn.Linear with a weight of torchao."""

    name = "torchao"

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        weight = module._parameters.get("weight")
        return type(weight).__module__.partition(".")[0] == "torchao"

    def values(self, module: nn.Module) -> Float[Tensor, "out in"]:
        weight = module.weight.detach()
        if type(weight).dequantize is not Tensor.dequantize:
            return weight.dequantize()
        identity = torch.eye(module.in_features, dtype=weight.dtype, device=weight.device)
        return functional.linear(identity, weight).T

    def describe(self, module: nn.Module) -> str:
        """The dtype of the integers or floats, and whether the inputs are quantized too."""
        weight = module.weight
        codes = getattr(weight, "target_dtype", None) or getattr(weight, "qdata", weight).dtype
        dynamic = " dynamic" if self.blocks_gradient(module) else ""
        return f"torchao {str(codes).removeprefix('torch.')}{dynamic}"

    def blocks_gradient(self, module: nn.Module) -> bool:
        inputs = ("act_quant_kwargs", "activation_quantization")
        return any(getattr(module.weight, name, None) is not None for name in inputs)
