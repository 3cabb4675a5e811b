"""Weights of nn.Linear, stored as (out, in)."""

from __future__ import annotations

from torch import nn

from lora_init.weights.float import FloatFormat


class LinearFormat(FloatFormat):
    """nn.Linear and its subclasses. Quantizers' formats come before it."""

    name = "Linear"
    cls = nn.Linear
