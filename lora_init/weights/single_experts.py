"""Checkpoints that store one tensor per expert, which transformers 5 fuses when it loads them.

`save_pretrained` splits the fused parameters again, so most checkpoints have these names:

| model | tensors of expert 3 |
|---|---|
| Qwen-MoE, DeepSeek, OLMoE | `mlp.experts.3.gate_proj.weight`, `up_proj`, `down_proj` |
| Mixtral, MiniMax | `block_sparse_moe.experts.3.w1.weight`, `w3`, `w2` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lora_init.weights.experts import FORMER

_TENSOR = re.compile(r"^(?P<module>.+)\.(?P<expert>\d+)\.(?P<matrix>\w+)\.weight$")
_FORMER_BLOCK, _BLOCK = ".block_sparse_moe.", ".mlp."


def present_name(name: str) -> str:
    """The name that transformers 5 gives to a module or tensor of a Mixtral checkpoint."""
    return name.replace(_FORMER_BLOCK, _BLOCK)


def single_experts(keys: Iterable[str]) -> dict[str, list[tuple[str, ...]]]:
    """The tensors of each expert, in row order, by the name of the parameter that fuses them.

    A parameter that lacks a tensor of an expert is left out.

    Args:
        keys: the names of a checkpoint's tensors.

    Examples:
        >>> single_experts(["experts.0.down_proj.weight", "experts.1.down_proj.weight"])
        {'experts.down_proj': [('experts.0.down_proj.weight',), ('experts.1.down_proj.weight',)]}
    """
    found: dict[str, dict[str, dict[int, str]]] = {}
    for key in keys:
        part = _TENSOR.match(key)
        if part is not None:
            matrices = found.setdefault(part["module"], {})
            matrices.setdefault(part["matrix"], {})[int(part["expert"])] = key
    fused = {}
    for module, matrices in found.items():
        for parameter, families in FORMER.items():
            for family in families:
                stored = [matrices.get(matrix, {}) for matrix in family]
                experts = range(len(stored[0]))
                if experts and all(sorted(keys) == list(experts) for keys in stored):
                    tensors = [tuple(keys[expert] for keys in stored) for expert in experts]
                    fused[present_name(f"{module}.{parameter}")] = tensors
    return fused
