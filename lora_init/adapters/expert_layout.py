"""The layout of experts' factors in a file, which is that of PEFT's `target_parameters`.

One fused parameter of E experts has two tensors, with the experts first in A and last in B:

    lora_A.weight (E · r, in) is A (E, r, in);  lora_B.weight (out, r · E) is B (out, r, E).

PEFT wraps a module once per parameter, and a key counts the wrappers outside of its own: with
`gate_up_proj` and `down_proj`, the keys are `experts.base_layer.lora_A.weight` for the first and
`experts.lora_A.weight` for the second. Elsewhere in this package the keys name the parameter:
`experts.gate_up_proj.lora_A.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lora_init.plan.match import name_matches
from lora_init.weights.experts import DOWN, FIRST

WRAPPED = "base_layer"
_KEY = re.compile(rf"^(?P<module>.+?)(?P<inside>(?:\.{WRAPPED})*)\.(?P<part>lora_[AB]\b.*)$")
# Own files have more parts than PEFT's. Their keys always name the parameter.


def to_file(part: str, value: Float[Tensor, "experts m n"]) -> Float[Tensor, "rows columns"]:
    """Flatten the factors of all experts; `part` ends in "_A" or "_B"."""
    if part.endswith("_A"):
        return value.flatten(0, 1)
    return value.permute(1, 2, 0).flatten(1)


def from_file(
    part: str, value: Float[Tensor, "rows columns"], experts: int
) -> Float[Tensor, "experts m n"]:
    """The inverse of `to_file`, contiguous."""
    if part.endswith("_A"):
        return value.unflatten(0, (experts, -1))
    return value.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()


def nested(tensors: Mapping[str, Tensor], parameters: Iterable[str], prefix: str) -> dict:
    """Rename the keys that name a fused parameter to PEFT's keys.

    Args:
        parameters: the names of the adapted fused parameters.
        prefix: the beginning of every key.
    """
    adapted: dict[str, list[str]] = {}
    for name in parameters:
        module, _, matrix = name.rpartition(".")
        adapted.setdefault(module, []).append(matrix)
    names = {}
    for module, matrices in adapted.items():
        for depth, matrix in enumerate(reversed(_in_order(matrices))):
            names[f"{prefix}{module}.{matrix}"] = ".".join([prefix + module, *[WRAPPED] * depth])
    renamed = {}
    for key, value in tensors.items():
        owner, _, part = key.partition(".lora_")
        if owner in names and part.startswith(("A.", "B.")):
            key = f"{names[owner]}.lora_{part}"
        renamed[key] = value
    return renamed


def named(
    tensors: Mapping[str, Any], entries: Collection[str], fused: Iterable[str]
) -> dict[str, Any]:
    """The inverse of `nested`: the keys of a file, with the names of fused parameters.

    Args:
        tensors: what belongs to each key of the file.
        entries: the file's `target_parameters`.
        fused: the names of the base model's fused parameters. Wrappers may have changed the names
            of outer modules, so only the name of the experts module itself must agree.
    """
    holders = {name.split(".")[-2] for name in fused}
    renamed = {}
    for key, value in tensors.items():
        found = _KEY.match(key)
        module = found["module"] if found else ""
        matrices = [
            matrix
            for matrix in (*FIRST, DOWN)
            if module.rpartition(".")[2] in holders
            and any(name_matches(f"{module}.{matrix}", entry) for entry in entries)
        ]
        depth = found["inside"].count(WRAPPED) if found else 0
        if found and depth < len(matrices):
            key = f"{module}.{_in_order(matrices)[-1 - depth]}.{found['part']}"
        renamed[key] = value
    return renamed


def _in_order(matrices: Iterable[str]) -> list[str]:
    """The parameters of a module in the order of their registration, which PEFT follows."""
    return sorted(matrices, key=(*FIRST, DOWN).index)
