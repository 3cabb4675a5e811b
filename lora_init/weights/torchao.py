"""Linear layers whose weight is a tensor subclass of torchao: int8, int4, float8, with or without
quantized inputs.

Sources: torchao's `quantize_`, whose configurations replace the weight and keep the module's class;
its `to_nf4`, for QLoRA.

Deviations:
    - A subclass without `dequantize`, such as some int4 layouts, is read by multiplying it with the
      identity matrix. Its kernel rounds the result to the module's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_init.weights.format import register_weight_format
from lora_init.weights.offload import stored_weight
from lora_init.weights.read_only import ReadOnlyFormat
from lora_init.weights.sharded import local_part


class TorchaoFormat(ReadOnlyFormat):
    """nn.Linear with a weight of torchao."""

    name = "torchao"

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        weight = module._parameters.get("weight")
        part = None if weight is None else local_part(weight)
        return type(part).__module__.partition(".")[0] == "torchao"

    def values(self, module: nn.Module) -> Float[Tensor, "out in"]:
        weight: Any = stored_weight(module).detach()  # a class of torchao
        if hasattr(weight, "get_original_weight"):  # NF4Tensor, whose `dequantize` is another
            return weight.get_original_weight()
        if type(weight).dequantize is not Tensor.dequantize:
            return weight.dequantize()
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return functional.linear(identity, weight).T

    def describe(self, module: nn.Module) -> str:
        """The dtype of the integers or floats, and whether the inputs are quantized too."""
        weight: Any = local_part(stored_weight(module))
        codes = getattr(weight, "target_dtype", None)
        if codes is None and hasattr(weight, "qdata"):
            codes = weight.qdata.dtype
        kind = type(weight).__name__.removesuffix("Tensor").lower() if codes is None else codes
        dynamic = " dynamic" if self.blocks_gradient(module) else ""
        return f"torchao {str(kind).removeprefix('torch.')}{dynamic}"

    def blocks_gradient(self, module: nn.Module) -> bool:
        inputs = ("act_quant_kwargs", "activation_quantization")
        weight = local_part(stored_weight(module))
        return any(getattr(weight, name, None) is not None for name in inputs)


register_weight_format(TorchaoFormat())
