"""The tensors of adapted attention modules in a file, which are those of PEFT.

| tensor | in the model | in a file |
|---|---|---|
| factors of in_proj | attn.in_proj.lora_A.weight | attn.lora_A.weight |
| A of out_proj | attn.out_proj.lora_A.weight | attn.base_layer.out_proj.lora_A.weight |
| B of out_proj | attn.out_proj.lora_B.weight | half, attn.base_layer.out_proj.lora_B.weight |
| its trained bias | attn.out_proj.base_layer.bias | attn.base_layer.out_proj.base_layer.bias |

PEFT (0.18 to 0.21.2) adds s B A to the weight of out_proj twice: its attention layer sets the
merged weight, and then merges out_proj again. With half of B, PEFT computes our output, and for a
file of PEFT we compute its output with twice its B. Both are exact in floating point.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lora_init.adapters.format import PREFIX

ATTENTION_OUTPUT = ".base_layer.out_proj"
"""Follows the name of an attention module in the keys of its output projection."""

OUT_FACTOR = "out_proj.lora_B.weight"


def in_file(tensors: Mapping[str, Tensor], attentions: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a file, from those with the names of the model's modules.

    Args:
        attentions: the names of the split attention modules.
    """
    found = {}
    for key, value in tensors.items():
        start, rest = _start(key, attentions)
        if rest == OUT_FACTOR:
            value = value / 2
        if rest.startswith("out_proj."):
            rest = f"base_layer.{rest}"
        else:
            rest = rest.removeprefix("in_proj.")
        found[start + rest if start else key] = value
    return found


def in_model(tensors: Mapping[str, Tensor], base: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The inverse of `in_file`, and the names of the attention modules to split."""
    ending = f"{ATTENTION_OUTPUT}.lora_A.weight"
    names = [k.removeprefix(PREFIX).removesuffix(ending) for k in tensors if k.endswith(ending)]
    modules = dict(base.named_modules())
    names = [name for name in names if isinstance(modules.get(name), nn.MultiheadAttention)]
    found = {}
    for key, value in tensors.items():
        start, rest = _start(key, names)
        if rest == f"base_layer.{OUT_FACTOR}":
            value = value * 2
        if rest.startswith("base_layer.out_proj."):
            rest = rest.removeprefix("base_layer.")
        else:
            rest = f"in_proj.{rest}"
        found[start + rest if start else key] = value
    return found, names


def _start(key: str, attentions: Collection[str]) -> tuple[str, str]:
    """A key as the prefix of its attention module and the rest; ("", "") for other keys."""
    for name in attentions:
        start = f"{PREFIX}{name}."
        if key.startswith(start):
            return start, key.removeprefix(start)
    return "", ""
