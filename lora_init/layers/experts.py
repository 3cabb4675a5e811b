"""Adapted fused experts: one adapted layer per 3-D parameter, held by one wrapper module.

The parameter of expert e computes ``W_e x + s B_e A_e x`` for the tokens that the router sends to
e. The wrapper replaces the experts module and runs its forward pass with the low-rank updates, so
no W + s B A is formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.factors import low_rank_product
from lora_init.layers.base import LoraLayer
from lora_init.layers.routed_product import Update, routed_call
from lora_init.linalg.matrix import widened
from lora_init.linalg.precision import full_precision
from lora_init.weights.offload import HOOK_ATTRIBUTES, has_hooks


class ExpertsLayer(LoraLayer):
    """The adapter of one fused parameter. A call returns its low-rank update.

    Attributes:
        matrix: the name of the parameter in the experts module.
        lora_A, lora_B: trainable factors, (experts, rank, in) and (experts, out, rank).
        lora_core: R, (experts, rank, rank), or None.
    """

    def __init__(self, base_layer: nn.Module, *factors: Tensor, matrix: str, **settings: Any):
        super().__init__(base_layer, *factors, **settings)
        self.matrix = matrix

    @property
    def experts(self) -> int:
        return self.lora_A.shape[0]

    @property
    def is_active(self) -> bool:
        """Whether the forward pass adds the update."""
        return self.adapter_enabled and not self.merged

    def forward(self) -> Update:
        initial = None, None
        if self.base_state == "in_forward":
            initial = self.initial_lora_A, self.initial_lora_B
        dropout = self.dropout if self.drops() else None
        return Update(self.lora_A, self.output_factor, self.scaling, *initial, dropout)

    @property
    def bias(self) -> None:
        """None: the biases of experts belong to the experts module."""
        return None

    def _present_weight(self) -> Tensor:
        stored, one = self.stored_weight, self._format
        if stored.is_meta or not self.is_active:
            return stored
        with full_precision():
            scaled = widened(self.output_factor) * self.scaling
            delta = scaled @ widened(self.lora_A)
            if self.base_state == "in_forward":
                scaled = widened(self.initial_lora_B) * self.scaling
                delta = delta - scaled @ widened(self.initial_lora_A)
            return (widened(stored) + one.stored(self.base_layer, delta)).to(stored.dtype)

    def merged_weight(self) -> Float[Tensor, "experts out in"]:
        """W + s B A in the parameter's dtype, computed expert by expert."""
        weight = self._oriented_weight()
        lora_B = self._exact_output_factor()
        merged = torch.empty_like(weight)
        for expert in range(self.experts):
            total = widened(weight[expert]) + low_rank_product(
                self.lora_A[expert], lora_B[expert], self.scaling
            )
            if self.base_state == "in_forward":
                total -= low_rank_product(
                    self.initial_lora_A[expert], self.initial_lora_B[expert], self.scaling
                )
            merged[expert] = total
        return merged

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"


class AdaptedForward(partial):
    """The forward pass that an experts module has while its hooks run."""


class LoraExperts(nn.Module):
    """An experts module with adapters on some of its fused parameters.

    Attributes that this class lacks are looked up in the experts module.

    Args:
        base_layer: the experts module.
        layers: the adapted layers by the names of their parameters.
    """

    base_layer: Any

    def __init__(self, base_layer: nn.Module, layers: Mapping[str, ExpertsLayer]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.matrices = tuple(layers)
        for matrix, layer in layers.items():
            setattr(self, matrix, layer)
        self.training = base_layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        layers: dict[str, Any] = {matrix: self._modules[matrix] for matrix in self.matrices}
        updates = {matrix: layer() for matrix, layer in layers.items() if layer.is_active}
        base = self.base_layer
        if not updates:
            return base(*args, **kwargs)
        own = vars(base).get("forward")
        if own is not None and not hasattr(base, HOOK_ATTRIBUTES[0]):
            raise RuntimeError(
                f"a forward was set on this {type(base).__name__} after it got an adapter, and "
                "adapted experts do not call it. Restore the forward of its class, or set it on "
                "the adapted module"
            )
        adapted = AdaptedForward(self._adapted_output, updates)
        if not has_hooks(base):
            return adapted(*args, **kwargs)
        base.forward = adapted
        try:
            return base(*args, **kwargs)
        finally:
            del base.forward
            if own is not None:
                base.forward = own

    def _adapted_output(
        self, updates: Mapping[str, Update], /, *args: Any, **kwargs: Any
    ) -> Tensor:
        return routed_call(self.base_layer, updates, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", *HOOK_ATTRIBUTES) or name.startswith("__"):
                raise
            return getattr(self.base_layer, name)
