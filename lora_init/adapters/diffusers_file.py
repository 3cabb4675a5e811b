"""Write the adapter file of diffusers, which has no configuration.

B is multiplied by s, since every version and pipeline of diffusers then computes s B A. All layers
get one rank, padded with zeros: older versions scale layers of another rank by another rule.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_init.adapters.diffusers_format import COMPONENTS, DIFFUSERS_NAME
from lora_init.adapters.file_layers import AdapterFile, FileLayer
from lora_init.adapters.format import PREFIX
from lora_init.files import write_atomically


def write_diffusers(folder: Path, found: AdapterFile, component: str) -> Path:
    """Write the file of an adapter that fits the original base; returns its path.

    Args:
        folder: the folder to write, which is created if needed.
        found: an adapter's folder, as `read_layers` gives it.
        component: the name of the model in its pipeline.

    Raises:
        ValueError: the adapter has more than low-rank factors of linear layers and convolutions.
    """
    layers = list(found.layers.values())
    embedding = next((layer.name for layer in layers if layer.is_embedding), None)
    experts = next((layer.name for layer in layers if layer.experts is not None), None)
    if embedding is not None or experts is not None or found.others or found.is_own:
        reason = "a convolution has a dilation or padding mode, which diffusers' layers ignore"
        if embedding is not None:
            reason = f"{embedding!r} is an embedding"
        elif experts is not None:
            reason = f"{experts!r} holds the factors of all experts"
        elif found.others:
            reason = f"the file contains {sorted(found.others)[0]!r}"
        raise ValueError(
            f"format='diffusers' is not supported for this adapter: {reason}. Merge the adapter, "
            "or save it in PEFT's format."
        )
    if component not in COMPONENTS:
        raise ValueError(
            f"component={component!r} is not supported: must be one of {', '.join(COMPONENTS)}"
        )
    rank, tensors = max(layer.rank for layer in layers), {}
    for layer in layers:
        for key, value in zip(layer.keys, _scaled(layer, rank), strict=True):
            tensors[f"{component}.{key.removeprefix(PREFIX)}"] = value.contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / DIFFUSERS_NAME
    write_atomically(path, lambda place: save_file(tensors, place, metadata={"format": "pt"}))
    return path


def _scaled(layer: FileLayer, rank: int) -> tuple[Tensor, Tensor]:
    """A and s B, padded with zeros to a rank."""
    lora_A, lora_B = layer.lora_A, layer.lora_B
    lora_B = (lora_B.float() * layer.scaling).to(lora_B.dtype)
    missing = rank - layer.rank
    return (
        torch.cat([lora_A, lora_A.new_zeros(missing, *lora_A.shape[1:])]),
        torch.cat([lora_B, lora_B.new_zeros(len(lora_B), missing, *lora_B.shape[2:])], dim=1),
    )
