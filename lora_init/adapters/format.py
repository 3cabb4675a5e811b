"""Names and shapes of the tensors in an adapter file.

| part | Linear, Conv1D, quantized | Conv2d | Embedding |
|---|---|---|---|
| lora_A | lora_A.weight (r, in) | lora_A.weight (r, c, h, w) | lora_embedding_A (r, entries) |
| lora_B | lora_B.weight (out, r) | lora_B.weight (out, r, 1, 1) | lora_embedding_B (width, r) |
| lora_bias | lora_B.bias (out,) | the same | – |
| lora_magnitude_vector | (out,) | (1, out, 1, 1) | (width,) |

The factors of fused experts have PEFT's layout, see `lora_init.adapters.expert_layout`.

Keys begin with "base_model.model." and the name of the module. The trained bias of an adapted
module is called base_layer.bias. Other biases and the tensors of fully trained modules keep their
names.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from lora_init.adapters.expert_layout import from_file
from lora_init.plan.plan import Target
from lora_init.weights.kinds import FORMATS, known_format

WEIGHTS_NAME = "adapter_model.safetensors"
OWN_WEIGHTS_NAME = "lora_init_adapter.safetensors"
CORE_NAME = "lora_init_core.safetensors"
"""The file of B and the trained core; see `lora_init.adapters.core_file`."""
PREFIX = "base_model.model."
HEADER_KEY = "lora_init"

_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}
_EMBEDDING_KEYS = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}

FIRST_FACTOR = (".lora_A.weight", ".lora_embedding_A")
"""Endings of the keys of first factors, which identify the adapted layers of a file."""


def part_key(target: Target, part: str) -> str:
    """The key of one tensor of a layer's adapter, as in PEFT; other parts keep their names."""
    is_lookup = FORMATS[target.module_type].operation == "lookup"
    keys = _EMBEDDING_KEYS if is_lookup else _KEYS
    return f"{PREFIX}{target.name}.{keys.get(part, part)}"


def peft_computes(module: nn.Module) -> bool:
    """Whether PEFT's adapted layer for this module computes the same output.

    PEFT's A of a Conv2d uses the stride and padding of the base, but not its dilation and padding
    mode.
    """
    if known_format(module).operation != "convolution":
        return True
    return module.dilation == (1, 1) and module.padding_mode == "zeros"


def bias_key(name: str, layers: Collection[str]) -> str:
    """The key of a trained bias."""
    module, _, last = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" if module in layers else PREFIX + name


def file_shape(target: Target, module: Any, part: str, rank: int) -> tuple[int, ...]:
    """The shape of a part in a file; A of a Conv2d has the kernel size of `module`."""
    rows, columns = target.shape
    rank *= target.experts or 1
    convolution = FORMATS[target.module_type].operation == "convolution"
    if part in ("replacement_A", "initial_A"):
        return rank, columns
    if part in ("replacement_B", "initial_B"):
        return rows, rank
    if part == "lora_A":
        return (rank, *module.weight.shape[1:]) if convolution else (rank, columns)
    if part == "lora_B":
        return (rows, rank, 1, 1) if convolution else (rows, rank)
    if part == "lora_magnitude_vector":
        return (1, rows, 1, 1) if convolution else (rows,)
    return (rows,)


def matrix(target: Target, part: str, tensor: Tensor) -> Tensor:
    """Reshape a tensor of a file for a layer: factors to matrices, other parts to vectors."""
    if target.experts is not None:
        return from_file(part, tensor, target.experts)
    return tensor.flatten(1) if part.endswith(("_A", "_B")) else tensor.flatten()
