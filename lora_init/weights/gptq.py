"""Weights of GPTQ layers: integers of 2, 3, 4 or 8 bits, with a scale and a zero point per group.

W[j, i] = scales[g, j] · (q[i, j] - zero[g, j]) with g = g_idx[i]. The integers are packed into
32-bit words along the inputs, the zero points along the outputs. With "act-order", `g_idx` is not
sorted.

Sources: Frantar et al. 2022 (arXiv 2210.17323); the layouts of AutoGPTQ and GPT-QModel.

Deviations:
    - Checkpoints of format v1 store each zero point minus 1, those of format v2 store it as it is.
      AutoGPTQ's layers hold v1. GPT-QModel's say which one they hold (`qzero_format`).
    - Some kernels reorder the integers when they are loaded. Those layers cannot be read.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights.format import WEIGHT, class_names, register_weight_format
from lora_init.weights.packed_integers import WORD, unpacked
from lora_init.weights.read_only import ReadOnlyFormat

# Base classes of GPT-QModel (since version 1, and since version 5) and the class of AutoGPTQ.
CLASSES = {"BaseQuantLinear", "GPTQuantLinear", "QuantLinear"}
REORDERING_KERNELS = (
    "marlin", "exllama", "machete", "bitblas", "fused", "ipex", "kernel", "int8",
    "mlx", "swordfish",
)  # fmt: skip
"""Parts of the class or module names of kernels that reorder the integers."""


def reordering_kernel(module: nn.Module) -> str | None:
    """The name of a kernel that has reordered the codes; None if they have the file's layout."""
    name = f"{type(module).__module__}.{type(module).__name__}".lower()
    found = next((kernel for kernel in REORDERING_KERNELS if kernel in name), None)
    if found is None:
        return None
    return (
        f"the {found} kernel stores its integers in another order; load the model with the torch "
        "or triton backend"
    )


class GPTQLayer(Protocol):
    """What is read of a layer. `g_idx` has the group of each input."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int


class GPTQFormat(ReadOnlyFormat):
    """The linear layers of AutoGPTQ and GPT-QModel, recognized by their class names."""

    name = "GPTQ"

    def matches(self, module: nn.Module) -> bool:
        names = class_names(module)
        is_awq = any(name.lower().startswith("awq") for name in names)
        return bool(names & CLASSES) and hasattr(module, "g_idx") and not is_awq

    def shape(self, module: nn.Module, name: str = WEIGHT) -> tuple[int, int]:
        layer = cast(GPTQLayer, module)
        return layer.scales.shape[-1], len(layer.g_idx)

    def opaque(self, module: nn.Module) -> str | None:
        if (reason := reordering_kernel(module)) is not None:
            return reason
        (rows, columns), layer = self.shape(module), cast(GPTQLayer, module)
        words = layer.qweight
        if (*words.shape, words.dtype) != (columns * layer.bits // WORD, rows, torch.int32):
            return f"its qweight has the unknown layout {tuple(words.shape)}, {words.dtype}"
        return None

    def values(self, module: nn.Module) -> Float[Tensor, "out in"]:
        layer = cast(GPTQLayer, module)
        bits, groups = layer.bits, layer.g_idx.long()
        codes = unpacked(layer.qweight.T.contiguous(), bits)
        zeros = unpacked(layer.qzeros, bits)
        if self._is_first_version(module):
            # A zero point of 0 is stored as 2^bits - 1, to which the sum wraps around.
            zeros = (zeros + 1) & ((1 << bits) - 1)
        scales = layer.scales.float()
        return (codes - zeros[groups].T) * scales[groups].T

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        return cast(GPTQLayer, module).scales.dtype

    def describe(self, module: nn.Module) -> str:
        layer = cast(GPTQLayer, module)
        groups = layer.g_idx
        if groups.is_meta:
            return f"gptq {layer.bits} bits"
        ordered = bool((groups[1:] >= groups[:-1]).all())
        size = len(groups) // len(layer.scales)
        return f"gptq {layer.bits} bits/{size}" + ("" if ordered else " act-order")

    def _is_first_version(self, module: nn.Module) -> bool:
        version = getattr(module, "qzero_format", None)
        return version is None or version() == 1


register_weight_format(GPTQFormat())
