"""Checkpoints that store experts under other names, which transformers 5 changes on loading.

Most store one tensor per expert, and some a stack. `save_pretrained` writes these names again:

| model | tensors of expert 3 |
|---|---|
| Qwen-MoE, DeepSeek, OLMoE | `mlp.experts.3.gate_proj.weight`, `up_proj`, `down_proj` |
| Mixtral, MiniMax | `block_sparse_moe.experts.3.w1.weight`, `w3`, `w2` |
| dots | `mlp.experts.3.fc1.weight`, `fc3`, `fc2` |
| GraniteMoE (all experts) | `block_sparse_moe.input_linear.weight`, `output_linear` |
| Aria (all experts) | `mlp.experts.fc1.weight`, `fc2` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from lora_init.weights.experts import DOWN, FORMER

_TENSOR = re.compile(r"^(?P<module>.+)\.(?P<expert>\d+)\.(?P<matrix>\w+)\.weight$")
_FAMILIES = {
    name: families + {"gate_up_proj": (("fc1", "fc3"),), DOWN: (("fc2",),)}.get(name, ())
    for name, families in FORMER.items()
}
FORMER_NAMES = (
    ("experts.gate_up_proj", "input_linear"),
    ("experts.down_proj", "output_linear"),
    ("experts.gate_up_proj", "experts.fc1"),
    ("experts.down_proj", "experts.fc2"),
    ("router", "router.layer"),
)
"""Ends of the names of parameters and routers, and what checkpoints may have instead."""

_FORMER_BLOCK, _BLOCK = ".block_sparse_moe.", ".mlp."


def present_name(name: str) -> str:
    """The name that transformers 5 gives to a module or tensor of a Mixtral checkpoint."""
    return name.replace(_FORMER_BLOCK, _BLOCK)


def former_names(name: str) -> Iterator[str]:
    """The names that checkpoints may have for a stack of experts or a router."""
    for present, former in FORMER_NAMES:
        if f".{name}".endswith(f".{present}"):
            yield name.removesuffix(present) + former


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
        for parameter, families in _FAMILIES.items():
            for family in families:
                stored = [matrices.get(matrix, {}) for matrix in family]
                experts = range(len(stored[0]))
                if experts and all(sorted(keys) == list(experts) for keys in stored):
                    tensors = [tuple(keys[expert] for keys in stored) for expert in experts]
                    fused[present_name(f"{module}.{parameter}")] = tensors
    return fused
