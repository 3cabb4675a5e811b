"""How the parts of an adapter are called and shaped in a file.

| part | Linear, Conv1D, quantised | Conv2d | Embedding |
|---|---|---|---|
| lora_A | lora_A.weight (r, in) | lora_A.weight (r, c, h, w) | lora_embedding_A (r, entries) |
| lora_B | lora_B.weight (out, r) | lora_B.weight (out, r, 1, 1) | lora_embedding_B (width, r) |
| lora_bias | lora_B.bias (out,) | the same | – |
| lora_magnitude_vector | (out,) | (1, out, 1, 1) | (width,) |

Keys begin with "base_model.model." and the module's name. A trained bias of an adapted module is
called base_layer.bias, any other keeps its name, as do the tensors of a module trained whole.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lora_init.plan.plan import Target
from lora_init.weights.kinds import module_type

WEIGHTS_NAME = "adapter_model.safetensors"
OWN_WEIGHTS_NAME = "lora_init_adapter.safetensors"
PREFIX = "base_model.model."
HEADER_KEY = "lora_init"

_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}
_EMBEDDING_KEYS = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}

FIRST_FACTOR = (".lora_A.weight", ".lora_embedding_A")
"""How the keys end by which a file's layers are found."""


def part_key(target: Target, part: str) -> str:
    """The key of a part of a layer's adapter; parts of our own are called as they are."""
    keys = _EMBEDDING_KEYS if target.module_type == "Embedding" else _KEYS
    return f"{PREFIX}{target.name}.{keys.get(part, part)}"


def peft_computes(module: nn.Module) -> bool:
    """Whether PEFT's layer around this module computes what the tensors say.

    Its A of a Conv2d has the base's stride and padding, but no dilation and no padding mode.
    """
    if module_type(module) != "Conv2d":
        return True
    return module.dilation == (1, 1) and module.padding_mode == "zeros"


def bias_key(name: str, layers: Mapping[str, object]) -> str:
    """The key of a trained bias."""
    module, _, last = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" if module in layers else PREFIX + name


def file_shape(target: Target, module: nn.Module, part: str, rank: int) -> tuple[int, ...]:
    """The shape of a part in a file. `module` is the base module, whose kernel A has."""
    rows, columns = target.shape
    convolution = target.module_type == "Conv2d"
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


def matrix(part: str, tensor: Tensor) -> Tensor:
    """A file's tensor as the layers hold it: factors as matrices, the rest as vectors."""
    return tensor.flatten(1) if part.endswith(("_A", "_B")) else tensor.flatten()
