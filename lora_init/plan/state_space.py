"""Detect layers of recurrent models that an adapter cannot serve.

On a GPU, Mamba's kernels read `conv1d.weight` and `out_proj.weight` without calling the layers. An
adapter on them would have no effect and would not train. RWKV divides some weights in place in eval
mode, which would not reach the adapter's part.
"""

from __future__ import annotations

from torch import nn

READ_BY_KERNELS = ("out_proj", "conv1d")
RESCALED = ("attention.output", "feed_forward.value")


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


def rescaled_in_place(model: nn.Module, name: str) -> str | None:
    """Why a layer of RWKV cannot be adapted; None for any other module.

    In eval mode, block i divides two weights by 2^(i // rescale_every), and training undoes that.
    """
    block, _, last = name.rpartition(".blocks.")[2].partition(".")
    if last not in RESCALED or not block.isdigit():
        return None
    owner = model.get_submodule(name.rpartition("blocks.")[0].rstrip("."))
    every = getattr(getattr(owner, "config", None), "rescale_every", 0)
    if not hasattr(owner, "_rescale_layers") or every <= 0 or int(block) < every:
        return None
    return (
        f"{type(owner).__name__} divides its weight in place in eval mode; set "
        "model.config.rescale_every=0 before the model runs to adapt it"
    )
