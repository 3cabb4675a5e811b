"""Weights of routers, which select the experts of each token.

transformers 5 stores the weight of most routers as a parameter (experts, hidden) of a module whose
forward pass also computes the selection. It returns a tuple, so a product cannot be added to it.
"""

from __future__ import annotations

from torch import nn

from lora_init.weights.experts import unusable
from lora_init.weights.float import FloatFormat
from lora_init.weights.format import WEIGHT, register_weight_format
from lora_init.weights.probe import Finding


class RouterFormat(FloatFormat):
    """A module with one row of `weight` per expert, as its attribute `num_experts` states."""

    name = "Router"
    operation = "selection"
    # An edited weight is rounded. That could change which experts the router selects.
    subtractions = ("in_forward",)

    def base_class(self, module: nn.Module) -> type[nn.Module] | None:
        weight = dict(module._parameters).get(WEIGHT)
        count = getattr(module, "num_experts", None)
        is_router = weight is not None and weight.ndim == 2 and weight.shape[0] == count
        return type(module) if is_router else None

    def refusal(self, module: nn.Module) -> str | None:
        reason = unusable(module, WEIGHT)
        return None if reason is None else f"is a {type(module).__name__}, {reason}"

    def replaced_forward(self, module: nn.Module) -> Finding | None:
        """A forward that was set on the instance is called with the adapted weight."""
        return None


register_weight_format(RouterFormat())
