"""Supported module types and the one place that knows how each stores its weight.

Everything else in the package sees weights as ``(out, in)``:

| type | stored as | seen as |
|---|---|---|
| Linear | (out, in) | itself |
| Conv1D (transformers) | (in, out) | its transpose |
| Embedding | (entries, width) | its transpose: out = width, in = entries, for one-hot inputs |
| Conv2d, one group | (out, channels, height, width) | (out, channels·height·width), for patches |
| Linear4bit, Linear8bitLt | packed codes and scales | the dequantised matrix, float32 |
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_init import packed

LINEAR_TYPES = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
MODULE_TYPES = (*LINEAR_TYPES, "Conv2d", "Embedding")
TRANSPOSED_TYPES = ("Conv1D", "Embedding")

# Forwards of quantised layers read codes; what they are is decided by class, never by dtype.
QUANTIZED_CLASSES = {"Linear4bit", "Linear8bitLt", "QuantLinear", "WQLinear_GEMM", "AqlmLinear"}


def class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def module_type(module: nn.Module) -> str:
    """Name the module's type as the registry spells it (`MODULE_TYPES`), else its class name.

    Decided by class, never by dtype. A subclass counts only if it inherits its forward:
    the out_proj of nn.MultiheadAttention, for one, is read by a fused kernel that would never see
    an adapter. The exception are transformers' scaled word embeddings, whose forward multiplies by
    `embed_scale`, which the adapted layer does too.
    """
    names = class_names(module)
    if packed.is_packed(module):
        return "Linear4bit" if "Linear4bit" in names else "Linear8bitLt"
    if names & QUANTIZED_CLASSES or "NonDynamicallyQuantizableLinear" in names:
        return type(module).__name__
    for name, cls in (("Linear", nn.Linear), ("Conv2d", nn.Conv2d), ("Embedding", nn.Embedding)):
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return name
    if isinstance(module, nn.Embedding) and embedding_scale(module) is not None:
        return "Embedding"
    if "Conv1D" in names and any(
        c.__module__.startswith("transformers") for c in type(module).__mro__
    ):
        return "Conv1D"
    return type(module).__name__


def embedding_scale(module: nn.Embedding) -> float | Tensor | None:
    """The factor that a scaled word embedding multiplies its rows by; None for a plain one."""
    scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    return getattr(module, "embed_scale", None) if scaled else None


def oriented_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """The weight as ``(out, in)``: a view on the module's own storage and in its own dtype, for
    packed modules a dequantised copy.
    """
    if packed.is_packed(module):
        return packed.dequantized(module)
    return orient(module_type(module), module.weight.detach())


def orient(kind: str, weight: Tensor) -> Float[Tensor, "out in"]:
    """A weight as a module of type `kind` stores it, seen as ``(out, in)``."""
    if kind in TRANSPOSED_TYPES:
        return weight.T
    return weight.flatten(1) if kind == "Conv2d" else weight


def stored_weight(module: nn.Module, weight: Float[Tensor, "out in"]) -> Tensor:
    """The inverse of `oriented_weight` for float modules: as the module stores it."""
    kind = module_type(module)
    if kind in TRANSPOSED_TYPES:
        return weight.T
    return weight.reshape(module.weight.shape) if kind == "Conv2d" else weight


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` without touching the data, so that it works on the meta device too."""
    if packed.is_packed(module):
        return packed.weight_shape(module)
    rows, *columns = module.weight.shape
    if module_type(module) in TRANSPOSED_TYPES:
        return columns[0], rows
    return rows, math.prod(columns)


def input_rows(module: nn.Module, x: Tensor) -> Float[Tensor, "positions in"]:
    """The vectors that the module multiplies its (out, in) weight by: tokens, or image patches."""
    if module_type(module) != "Conv2d":
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    if padded.ndim == 3:
        padded = padded[None]
    patches = functional.unfold(
        padded, module.kernel_size, dilation=module.dilation, stride=module.stride
    )
    return patches.transpose(1, 2).flatten(0, 1)


def reading(module: nn.Module) -> tuple | None:
    """How `input_rows` cuts an input: modules that agree in it read the same rows of one tensor."""
    if module_type(module) != "Conv2d":
        return None
    return (
        module.kernel_size, module.stride, str(module.padding), module.dilation, module.padding_mode
    )  # fmt: skip


def weight_description(module: nn.Module) -> str:
    """The weight's dtype, or what a packed module holds, e.g. "nf4/64"."""
    if packed.is_packed(module):
        return packed.description(module)
    return str(module.weight.dtype).removeprefix("torch.")


def widened(weight: Tensor) -> Tensor:
    """At least float32: 16-bit weights are never calculated with."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
