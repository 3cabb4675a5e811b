"""Adapted linear layers: nn.Linear, transformers' Conv1D, bitsandbytes' 4-bit and 8-bit."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lora_init.layers.adapted_product import adapted_product
from lora_init.layers.base import LoraLayer, common_dtype


class LinearLayer(LoraLayer):
    """``h = base(x) + s B A x``, x (..., in) and h (..., out)."""

    def _low_rank(
        self,
        x: Float[Tensor, "*batch in"],
        lora_A: Float[Tensor, "rank in"],
        lora_B: Float[Tensor, "out rank"],
    ) -> Float[Tensor, "*batch out"]:
        dtype = common_dtype(x, lora_A)
        hidden = functional.linear(x.to(dtype), lora_A.to(dtype)) * self.scaling
        return functional.linear(hidden, lora_B.to(dtype))

    def _base_without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        base = self.base_layer
        if self.module_type == "Linear":
            return functional.linear(x, base.weight), base.bias
        if self.module_type == "Conv1D":
            return x @ base.weight, base.bias
        result = base(x)  # a packed weight: only its own kernel can multiply by it
        return (result, None) if base.bias is None else (result - base.bias, base.bias)

    def _adapted_without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """In one step where all have one dtype: DoRA has to keep a block more than LoRA anyway."""
        weight = self._plain_weight(x)
        if weight is None:
            return super()._adapted_without_bias(x)
        outputs = adapted_product(x, weight, self.lora_A, self.lora_B, self.scaling)
        return outputs, self.base_layer.bias, outputs.dtype

    def _plain_weight(self, x: Tensor) -> Float[Tensor, "in out"] | None:
        """The base's, if one product after another adds up to V x in x's own dtype."""
        if self.module_type not in ("Linear", "Conv1D") or self.base_state == "in_forward":
            return None
        weight = self.base_layer.weight
        dtypes = {part.dtype for part in (x, weight, self.lora_A, self.lora_B)}
        if len(dtypes) > 1 or torch.is_autocast_enabled(x.device.type):
            return None
        return weight.T if self.module_type == "Linear" else weight
