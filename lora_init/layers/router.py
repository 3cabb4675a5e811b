"""Adapted routers: the module's own forward pass, with the adapted weight.

A router computes its scores and selects experts in one forward pass. It therefore runs with
``W + s B A`` as its weight. This matrix has one row per expert, so forming it costs little.
"""

from __future__ import annotations

from typing import Any

from torch.func import functional_call

from lora_init.layers.base import LoraLayer
from lora_init.weights.format import WEIGHT


class RouterLayer(LoraLayer):
    """``base(x)`` with the weight ``W + s B A``, in the dtype of W.

    A 16-bit W rounds the sum once, as in PEFT. At step 0 the weight is exactly W: subtracting
    methods compute ``W + s (B A - B0 A0)``.
    """

    drops_inputs = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.merged or not self.adapter_enabled:
            return self.base_layer(*args, **kwargs)
        weight = self._present_weight()
        return functional_call(self.base_layer, {WEIGHT: weight}, args, kwargs)
