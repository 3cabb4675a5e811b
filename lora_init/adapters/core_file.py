"""The file of trained cores, which lets training continue from a plain adapter file.

A layer with a core adds s B R A x. The adapter file holds A and B R, so every loader reads a plain
LoRA of the same rank. A second file holds B and R of each layer. The header of the adapter file
holds a checksum of the second file, so that files of different saves are not combined.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_init.adapters.format import CORE_NAME
from lora_init.cache import key
from lora_init.factors import output_factor
from lora_init.files import write_atomically
from lora_init.linalg.precision import full_precision
from lora_init.plan.check import FLOAT_DTYPES

Cores = dict[str, dict[str, Tensor]]
"""By layer, the parts "lora_B" (out, rank) and "lora_core" (rank, rank), or stacks of experts."""

# B R of the file was computed by another machine, and a converter may have rounded it to 16 bits.
LARGEST_GAP = 1e-2


def write_cores(folder: Path, cores: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Write the file atomically; returns its checksum."""
    tensors = {
        f"{name}.{part}": value.detach().cpu().contiguous().clone()
        for name, parts in cores.items()
        for part, value in parts.items()
    }
    write_atomically(folder / CORE_NAME, lambda path: save_file(tensors, path))
    return checksum(tensors)


def read_cores(folder: Path, expected: str) -> Cores | None:
    """Read the file of a header's checksum; None, with a warning, if it is missing.

    Raises:
        ValueError: the file is damaged, or from another save.
    """
    path = folder / CORE_NAME
    if not path.is_file():
        warnings.warn(
            f"{CORE_NAME} is missing in {str(folder)!r}, so the adapter is loaded as a plain LoRA, "
            "whose A and B are trained. Copy this file too, to train the core again.",
            stacklevel=5,
        )
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or save it again.") from error
    if checksum(tensors) != expected:
        raise ValueError(
            f"{path} does not belong to the adapter file (its checksum differs). Copy the whole "
            "folder of one save."
        )
    cores: Cores = {}
    for name, value in tensors.items():
        layer, _, part = name.rpartition(".")
        cores.setdefault(layer, {})[part] = value
    return cores


def checked_core(name: str, cores: Cores, folded: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B and R of a layer, checked against B R of the adapter file.

    Raises:
        ValueError: a tensor is missing, has a wrong shape or dtype, or B R is another matrix.
    """
    shapes = {"lora_B": tuple(folded.shape), "lora_core": (*folded.shape[:-2], rank, rank)}
    for part, shape in shapes.items():
        value = cores.get(name, {}).get(part)
        if value is None or tuple(value.shape) != shape or value.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{CORE_NAME}: {name}.{part} must have shape {shape}. Save again.")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{CORE_NAME}: {name}.{part} contains NaN or infinite values.")
    lora_B, core = cores[name]["lora_B"], cores[name]["lora_core"]
    with full_precision():
        product = output_factor(lora_B, core).double()
    if (product - folded.double()).norm() > LARGEST_GAP * product.norm():
        raise ValueError(
            f"{CORE_NAME}: B R of {name!r} differs from the adapter file, which was changed after "
            f"it was saved. Delete {CORE_NAME} to load the adapter as a plain LoRA."
        )
    return lora_B, core


def checksum(tensors: Mapping[str, Tensor]) -> str:
    return key("cores", 1, dict(tensors))
