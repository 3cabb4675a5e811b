"""`lora-init inspect`: the layers of an adapter file, and how each loader scales them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from lora_init.adapters.file_layers import AdapterFile, FileLayer, read_layers
from lora_init.cli.checkpoints import checkpoint_folder
from lora_init.cli.output import emit
from lora_init.plan.tables import render
from lora_init.progress import tracked
from lora_init.weights.checkpoint import OriginalWeights

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank."""


def inspect_adapter(arguments: Namespace) -> None:
    """Print ranks, scalings, norms and singular values, and the scaling in each loader.

    A fused parameter of experts has one row: norms are those of all its experts, singular values
    are root mean squares over them, and `used` is the largest numerical rank.

    With --against, norms are also given relative to the base weight, which is read lazily.
    """
    found = read_layers(Path(arguments.adapter))
    base = None
    if arguments.against is not None:
        base = OriginalWeights(checkpoint_folder(arguments.against))
    layers = [
        _figures(layer, base) for layer in tracked(list(found.layers.values()), "singular values")
    ]
    loaders = loader_notes(found)
    header = ["layer", "out×in", "rank", "used", "scaling", "‖A‖", "‖B‖", "‖sBA‖", "σ₁", "σ_r"]
    rows = [
        [
            row["name"],
            f"{row['shape'][0]}×{row['shape'][1]}"
            + (f" ({row['experts']} experts)" if row["experts"] else ""),
            row["rank"],
            row["numerical_rank"],
            row["scaling"],
            row["norm_A"],
            row["norm_B"],
            row["norm"],
            row["singular_values"][0],
            row["singular_values"][-1],
        ]
        for row in layers
    ]
    if base is not None:
        header.append("‖sBA‖/‖W‖")
        for row, cells in zip(layers, rows, strict=True):
            cells.append(row["relative_norm"])
    config = found.config
    text = [
        f"{arguments.adapter}: {len(layers)} layers, "
        f"{sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in found.layers.values()):,} "
        f"values in factors; method {found.method or config.init_lora_weights!r}",
        render(header, rows),
        *(f"{loader}: {note}" for loader, note in loaders.items()),
    ]
    if found.others:
        text.append(f"other tensors: {len(found.others)} (biases, magnitudes, trained modules)")
    data = {
        "adapter": str(arguments.adapter),
        "method": found.method or config.init_lora_weights,
        "layers": layers,
        "loaders": loaders,
        "other_tensors": sorted(found.others),
    }
    emit(arguments, data, "\n".join(text))


def _figures(layer: FileLayer, base: OriginalWeights | None) -> dict[str, Any]:
    singles = layer.single()
    spectra = [one.cores()[1] for one in singles]
    values = torch.stack(spectra).square().mean(0).sqrt()
    norm = len(singles) ** 0.5 * float(torch.linalg.vector_norm(values))
    figures: dict[str, Any] = {
        "name": layer.name,
        "shape": list(layer.shape),
        "rank": layer.rank,
        "experts": layer.experts,
        "numerical_rank": max(
            int((found > one.noise()).sum()) for one, found in zip(singles, spectra, strict=True)
        ),
        "alpha": layer.alpha,
        "scaling": layer.scaling,
        "dtype": str(layer.lora_A.dtype).removeprefix("torch."),
        "norm_A": float(torch.linalg.vector_norm(layer.lora_A.double())),
        "norm_B": float(torch.linalg.vector_norm(layer.lora_B.double())),
        "norm": norm,
        "singular_values": values.tolist(),
    }
    if base is not None:
        weight = base.weight(layer.name)
        *stack, rows, columns = weight.shape if layer.experts else weight.flatten(1).shape
        if sorted(layer.shape) != sorted((rows, columns)) or stack != [layer.experts][: len(stack)]:
            raise ValueError(
                f"--against: the weight of {layer.name!r} has shape {tuple(weight.shape)} there, "
                f"and the adapter has {layer.shape}. Pass the base model of this adapter."
            )
        total = float(torch.linalg.vector_norm(weight.double()))
        figures["relative_norm"] = norm / total if total > 0 else None
    return figures


def loader_notes(found: AdapterFile) -> dict[str, str]:
    """What PEFT, vLLM, llama.cpp and diffusers make of a file, in one line each.

    The rules are those of PEFT 0.21, vLLM 0.11, llama.cpp's converter and diffusers 0.42.
    """
    config, layers = found.config, list(found.layers.values())
    wrong = [layer.name for layer in layers if layer.rank != layer.expected_rank]
    notes = {"PEFT": "scales all layers as in the table"}
    if wrong:
        notes["PEFT"] = (
            f"refuses the file: {wrong[0]!r} has rank {found.layers[wrong[0]].rank}, and its "
            f"configuration states {found.layers[wrong[0]].expected_rank}"
        )
    obstacle = loader_obstacle(found)
    root = config.r**0.5 if config.use_rslora else config.r
    largest = max(layer.rank for layer in layers)
    needed = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    if obstacle is not None:
        notes["vLLM"] = notes["llama.cpp"] = f"cannot load it: {obstacle}"
    else:
        notes["vLLM"] = _scaled(layers, {la.name: config.lora_alpha / root for la in layers})
        notes["vLLM"] += (
            f"; needs --max-lora-rank {needed}" if needed else f"; rank {largest} is too large"
        )
        notes["llama.cpp"] = _scaled(
            layers, {la.name: config.lora_alpha / la.rank for la in layers}
        )
    notes["diffusers"] = _scaled(layers, {layer.name: 1.0 for layer in layers})
    if not notes["diffusers"].startswith("scales all"):
        notes["diffusers"] += "; convert with --format diffusers"
    return notes


def loader_obstacle(found: AdapterFile) -> str | None:
    """Why vLLM and llama.cpp cannot load a file; None if they can."""
    config = found.config
    settings = {"use_dora": config.use_dora, "lora_bias": config.lora_bias}
    for name, used in settings.items():
        if used:
            return f"{name}=true"
    if config.bias != "none":
        return f"bias={config.bias!r}"
    if config.modules_to_save:
        return f"modules_to_save={config.modules_to_save!r}"
    for layer in found.layers.values():
        if layer.experts is not None:
            return f"{layer.name!r} holds the factors of all experts"
        if layer.is_embedding or layer.lora_A.ndim != 2:
            return f"{layer.name!r} is not a linear layer"
    return None


def _scaled(layers: list[FileLayer], scalings: dict[str, float]) -> str:
    """A phrase that compares a loader's scalings with those of the configuration."""
    ratios = {
        layer.name: scalings[layer.name] / layer.scaling
        for layer in layers
        if abs(scalings[layer.name] / layer.scaling - 1) > 1e-9
    }
    if not ratios:
        return "scales all layers as in the table"
    name, ratio = max(ratios.items(), key=lambda pair: abs(pair[1] - 1))
    return (
        f"scales {len(ratios)} of {len(layers)} layers differently, by up to ×{ratio:.3g} ({name})"
    )
