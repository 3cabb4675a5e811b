"""Detect layers of a state-space mixer that are never called, because a fused kernel reads them.

On a GPU, Mamba's kernels read `conv1d.weight` and `out_proj.weight` without calling the layers. An
adapter on them would have no effect and would not train.
"""

from __future__ import annotations

from torch import nn

READ_BY_KERNELS = ("out_proj", "conv1d")


def read_by_kernel(model: nn.Module, name: str) -> str | None:
    """Why a layer of a state-space mixer cannot be adapted; None for any other module.

    A mixer is recognized by its structure: parameters A_log and D, modules conv1d and out_proj.
    Gated delta networks have no D; their kernels call out_proj.
    """
    owner, _, last = name.rpartition(".")
    if last not in READ_BY_KERNELS:
        return None
    mixer = model.get_submodule(owner)
    if not {"A_log", "D"} <= mixer._parameters.keys():
        return None
    if not set(READ_BY_KERNELS) <= mixer._modules.keys():
        return None
    return (
        f"the fused kernel of {type(mixer).__name__} reads its weight in training and does not "
        "call the layer"
    )
