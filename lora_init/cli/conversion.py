"""`lora-init convert`: write an adapter with another rank, scaling or file format."""

from __future__ import annotations

import dataclasses
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from lora_init import LoraConfig
from lora_init.adapters.diffusers_file import write_diffusers
from lora_init.adapters.file_layers import AdapterFile, FileLayer, read_layers, write_plain
from lora_init.adapters.portable import portable_config, portable_factors
from lora_init.cli.inspection import loader_obstacle
from lora_init.cli.output import check_folder, emit
from lora_init.config.file import method_of
from lora_init.plan.tables import render
from lora_init.progress import tracked
from lora_init.weights.format import WEIGHT

CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga")
"""Starts of PEFT whose unconverted files belong to a base that PEFT changed."""


def convert_adapter(arguments: Namespace) -> None:
    """Truncate, rescale or rename the tensors of an adapter; print the error of each layer.

    The matrix of each expert is truncated by itself.

    Raises:
        ValueError: a setting is not supported for this adapter. Nothing is written then.
    """
    found = read_layers(Path(arguments.adapter))
    _check(found, arguments)
    layers, errors = list(found.layers.values()), {}
    if arguments.rank is not None:
        pairs = [
            _truncated(layer, arguments.rank, found.config)
            for layer in tracked(layers, "truncation")
        ]
        layers = [layer for layer, _ in pairs]
        errors = {layer.name: error for layer, error in pairs}
    out = Path(arguments.out)
    config = _with_patterns(found.config, layers)
    if arguments.format == "diffusers":
        layers_by_name = {layer.name: layer for layer in layers}
        path = write_diffusers(
            out,
            dataclasses.replace(found, layers=layers_by_name),
            arguments.component or "transformer",
        )
    elif arguments.portable:
        rank = max(layer.rank for layer in layers)
        layers = [_portable(layer, rank) for layer in layers]
        write_plain(out, portable_config(config, rank), layers)
        path = out
    else:
        write_plain(out, config, layers, found.others)
        path = out
    data: dict[str, Any] = {
        "path": str(path),
        "layers": [
            {"name": layer.name, "rank": layer.rank, "error": errors.get(layer.name)}
            for layer in layers
        ],
    }
    text = f"{path}: {len(layers)} layers, largest rank {max(layer.rank for layer in layers)}"
    if errors:
        rows = [[layer.name, layer.rank, errors[layer.name]] for layer in layers]
        text = f"{render(['layer', 'rank', 'relative error of sBA'], rows)}\n{text}"
    emit(arguments, data, text)


def _check(found: AdapterFile, arguments: Namespace) -> None:
    method = method_of(found.config.init_lora_weights)
    if isinstance(method, str) and method.startswith(CHANGED_BASES):
        raise ValueError(
            f"init_lora_weights={method!r} in {arguments.adapter} is not supported: PEFT changed "
            "the base, and the factors belong to that base. Save it with PEFT's "
            "path_initial_model_for_weight_conversion first."
        )
    if arguments.portable and arguments.format == "diffusers":
        raise ValueError(
            "--portable is not supported with --format diffusers, whose file has the scaling in B: "
            "leave one of them out"
        )
    if arguments.component is not None and arguments.format != "diffusers":
        raise ValueError(
            f"--component {arguments.component} is not supported with --format peft: pass --format "
            "diffusers, or leave it out"
        )
    if arguments.rank is not None and arguments.rank < 1:
        raise ValueError(f"--rank {arguments.rank} is not supported: must be at least 1")
    if arguments.rank is not None and found.config.use_dora:
        raise ValueError(
            "--rank is not supported with use_dora=true: the trained magnitudes belong to the rows "
            "of the full product. Merge the adapter instead."
        )
    if arguments.portable:
        embedding = next((la.name for la in found.layers.values() if la.is_embedding), None)
        obstacle = loader_obstacle(found)
        if obstacle is None and embedding is not None:
            obstacle = f"{embedding!r} is an embedding"
        if obstacle is not None:
            raise ValueError(
                f"--portable is not supported for this adapter: {obstacle}. Merge the adapter, or "
                "convert without this option."
            )
    out = Path(arguments.out)
    if out.exists() and out.resolve() == Path(arguments.adapter).resolve():
        raise ValueError(f"OUT={str(out)!r} is the adapter itself: must be another folder")
    check_folder(out)


def _portable(layer: FileLayer, rank: int) -> FileLayer:
    factors = portable_factors(layer.lora_A, layer.lora_B, layer.scaling, rank)
    return dataclasses.replace(layer, lora_A=factors[0], lora_B=factors[1])


def _truncated(layer: FileLayer, rank: int, config: LoraConfig) -> tuple[FileLayer, float]:
    """The best approximation of s B A with a smaller rank, and its relative Frobenius error.

    For experts, of each s B A, and the error of all together.
    """
    if rank >= layer.rank:
        return layer, 0.0
    singles = layer.single()
    cores = [one.cores() for one in singles]
    if all(float(v[0]) <= one.noise() for one, (_, v, _) in zip(singles, cores, strict=True)):
        raise ValueError(
            f"--rank {rank} is not supported: s B A of {layer.name!r} is zero, as at the start of "
            "training. Its truncation could not be trained. Make an adapter of this rank instead."
        )
    spectra = torch.stack([values for _, values, _ in cores])
    error = float(torch.linalg.vector_norm(spectra[:, rank:]) / torch.linalg.vector_norm(spectra))
    alpha = layer.scaling / config.scaling(rank, 1.0)
    truncated = []
    for one, (u, values, v) in zip(singles, cores, strict=True):
        roots = (values[:rank] / layer.scaling).sqrt()
        lora_A, lora_B = roots[:, None] * v[:, :rank].T, u[:, :rank] * roots
        if float(values[0]) <= one.noise():  # an expert that no token has reached
            lora_A, lora_B = one.lora_A[:rank], torch.zeros_like(lora_B)
        truncated.append(one.with_factors(lora_A, lora_B, alpha))
    return layer.joined(truncated), error


def _with_patterns(config: LoraConfig, layers: list[FileLayer]) -> LoraConfig:
    """The configuration with today's ranks and alphas.

    Patterns hold the exceptions. Most layers have the common rank and alpha.
    """
    pairs = [(layer.rank, layer.alpha) for layer in layers]
    rank, alpha = max(set(pairs), key=pairs.count)
    # PEFT matches the name of a weight that target_parameters selects, such as a router's.
    optional = rf"(\.{WEIGHT})?" if config.target_parameters else ""
    keys = {layer.name: f"^{re.escape(layer.name)}{optional}" for layer in layers}
    return dataclasses.replace(
        config,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={keys[la.name]: la.rank for la in layers if la.rank != rank},
        alpha_pattern={keys[la.name]: la.alpha for la in layers if la.alpha != alpha},
    )
