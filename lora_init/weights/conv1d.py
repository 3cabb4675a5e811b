"""Weights of transformers' Conv1D, a linear layer that stores (in, out)."""

from __future__ import annotations

from torch import nn

from lora_init.weights.float import FloatFormat
from lora_init.weights.format import register_weight_format


class Conv1DFormat(FloatFormat):
    """transformers' Conv1D, recognized by name, so that transformers need not be installed."""

    name = "Conv1D"
    transposed = True

    def base_class(self, module: nn.Module) -> type[nn.Module] | None:
        for cls in type(module).__mro__:
            if cls.__name__ == self.name and cls.__module__.startswith("transformers"):
                return cls
        return None


register_weight_format(Conv1DFormat())
