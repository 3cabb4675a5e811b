"""Names and shapes of the tensors in an adapter file.

| part | Linear, Conv1D, quantized | convolution | Embedding |
|---|---|---|---|
| lora_A | lora_A.weight (r, in) | lora_A.weight (r, c, *kernel) | lora_embedding_A (r, entries) |
| lora_B | lora_B.weight (out, r) | lora_B.weight (out, r / g, *1) | lora_embedding_B (width, r) |
| lora_bias | lora_B.bias (out,) | the same | – |
| lora_magnitude_vector | (out,) | (1, out, *1) | (width,) |

Here *1 is a kernel size of 1, with as many dimensions as the kernel, and g the number of groups. c
counts the channels of all groups, as in PEFT. Kernels of this package are zero for those of others,
unless PEFT has trained them.

The factors of fused experts have PEFT's layout, see `lora_init.adapters.expert_layout`.

Keys begin with "base_model.model." and the name of the module. The trained bias of an adapted
module is called base_layer.bias. Other biases and the tensors of fully trained modules keep their
names.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.adapters.expert_layout import from_file, to_file
from lora_init.factors import block_matrix, matrix_blocks
from lora_init.plan.plan import Target
from lora_init.weights.experts import is_transposed as is_stored_transposed
from lora_init.weights.kinds import FORMATS, known_format
from lora_init.weights.patches import is_transposed

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


def peft_computes(module: Any, use_dora: bool) -> bool:
    """Whether PEFT's adapted layer for this module computes the same output.

    PEFT's A of a convolution uses the stride and padding of the base, but not its dilation and
    padding mode. PEFT's DoRA fails for a grouped convolution, and PEFT has no layer for a
    transposed one.
    """
    if known_format(module).operation != "convolution":
        return True
    if is_transposed(module) or (use_dora and module.groups > 1):
        return False
    return set(module.dilation) == {1} and module.padding_mode == "zeros"


def peft_transposes(target: Target, module: Any) -> bool:
    """Whether PEFT adapts the transposed matrices of these experts, as it does for Llama-4.

    PEFT reads a stack that does not declare its layout as (experts, out, in). For a stack that is
    (experts, in, out), its A is Bᵀ of this package, and its B is Aᵀ.
    """
    if target.experts is None:
        return False
    return is_stored_transposed(module) and not hasattr(module, "is_transposed")


def bias_key(name: str, layers: Collection[str]) -> str:
    """The key of a trained bias."""
    module, _, last = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" if module in layers else PREFIX + name


def file_shape(target: Target, module: Any, part: str, rank: int) -> tuple[int, ...]:
    """The shape of a part in a file; A of a convolution has the kernel size of `module`."""
    rows, columns = target.shape
    rank *= target.experts or 1
    convolution = FORMATS[target.module_type].operation == "convolution"
    size = tuple(module.kernel_size) if convolution else ()
    ones = (1,) * len(size)
    if part in ("replacement_A", "initial_A"):
        return rank, columns
    if part in ("replacement_B", "initial_B"):
        return rows, rank
    if part == "lora_A":
        return (rank, module.in_channels, *size) if convolution else (rank, columns)
    if part == "lora_B":
        return rows, rank // target.groups, *ones
    if part == "lora_magnitude_vector":
        return (1, rows, *ones) if convolution else (rows,)
    return (rows,)


def in_file(target: Target, module: Any, part: str, value: Tensor, rank: int) -> Tensor:
    """A part of a layer in the shape that it has in a file."""
    if target.experts is not None:
        return to_file(part, value)
    if part == "lora_A" and value.shape[1] == target.shape[1]:
        value = block_matrix(value, target.groups)
    return value.reshape(file_shape(target, module, part, rank))


def in_layer(target: Target, part: str, tensor: Tensor) -> Tensor:
    """The inverse of `in_file`: factors are matrices, other parts vectors.

    A of a grouped convolution keeps the channels of all groups if it is not zero between them.
    """
    if target.experts is not None:
        return from_file(part, tensor, target.experts)
    if not part.endswith(("_A", "_B")):
        return tensor.flatten()
    if part != "lora_A" or target.groups == 1:
        return tensor.flatten(1)
    blocks = matrix_blocks(tensor.flatten(1), target.groups)
    is_grouped = torch.count_nonzero(blocks) == torch.count_nonzero(tensor)
    return blocks if is_grouped else tensor.flatten(1)


def own_channels(target: Target, lora_A: Float[Tensor, "*experts rank in"]) -> Tensor:
    """A with the channels of each group only: the columns that `target.shape` counts."""
    is_wide = target.groups > 1 and lora_A.shape[-1] != target.shape[1]
    return matrix_blocks(lora_A, target.groups) if is_wide else lora_A


def doubled_rank(
    lora_A: Float[Tensor, "*experts rank in"],
    lora_B: Float[Tensor, "*experts out rank_of_group"],
    initial_A: Float[Tensor, "*experts rank in"],
    initial_B: Float[Tensor, "*experts out rank"],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """[A; A0] and [B, -B0], group by group; their product is B A - B0 A0."""
    if lora_A.ndim > 2:
        return torch.cat([lora_A, initial_A], dim=1), torch.cat([lora_B, -initial_B], dim=2)
    if lora_A.shape[1] != initial_A.shape[1]:  # PEFT has trained A for all channels
        initial_A = block_matrix(initial_A, groups)
    rows = [each.unflatten(0, (groups, -1)) for each in (lora_A, initial_A)]
    blocks = matrix_blocks(initial_B, groups)
    return torch.cat(rows, dim=1).flatten(0, 1), torch.cat([lora_B, -blocks], dim=1)


def halved_rank(
    lora_A: Float[Tensor, "*experts ranks in"],
    lora_B: Float[Tensor, "*experts out ranks_of_group"],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverse of `doubled_rank`. Both parts of A have the same width."""
    if lora_A.ndim > 2:
        (A, initial_A), (B, negative_B) = lora_A.chunk(2, dim=1), lora_B.chunk(2, dim=2)
        return A, B, initial_A, -negative_B
    A, initial_A = lora_A.unflatten(0, (groups, 2, -1)).unbind(1)
    B, negative_B = lora_B.chunk(2, dim=1)
    initial_B = block_matrix(-negative_B, groups)
    return A.flatten(0, 1), B, initial_A.flatten(0, 1), initial_B
