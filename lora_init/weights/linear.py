"""Weights of nn.Linear, stored as (out, in)."""

from __future__ import annotations

from torch import nn

from lora_init.weights.float import FloatFormat
from lora_init.weights.format import class_names

# Quantizers' classes whose forwards read codes. They are recognized by name, never by dtype.
PACKED_CLASSES = {"Linear4bit", "Linear8bitLt", "QuantLinear", "WQLinear_GEMM", "AqlmLinear"}


class LinearFormat(FloatFormat):
    """nn.Linear and its subclasses, except quantizers' classes."""

    name = "Linear"
    cls = nn.Linear

    def base_class(self, module: nn.Module) -> type[nn.Module] | None:
        return None if class_names(module) & PACKED_CLASSES else super().base_class(module)
