"""Models. The type of the configuration selects the source; each source is one file.

To add one: a dataclass derived from `ModelConfig` and a `locate(config) -> Checkpoint` in a file
here, a line in `SOURCES`, and a YAML in `conf/model/`. A model in a folder needs none of this:
`model=local model.path=…`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..config.inputs import ModelConfig
from ..config.store import register_sources
from . import local, minilm, quantization, smollm2
from .pretrained import checkpoint_activations, load_checkpoint
from .source import Checkpoint

SOURCES: dict[type[ModelConfig], Callable[[Any], Checkpoint]] = {
    minilm.MiniLM: minilm.locate,
    smollm2.SmolLM2: smollm2.locate,
    local.LocalModel: local.locate,
}
register_sources("model", SOURCES)

PACKAGED: dict[str, type[ModelConfig]] = {"minilm": minilm.MiniLM, "smollm2": smollm2.SmolLM2}
"""Models that a Python package ships, by their short names."""

__all__ = [
    "PACKAGED",
    "SOURCES",
    "LoadedModel",
    "ModelConfig",
    "checkpoint_activations",
    "load_model",
    "packaged_folder",
]


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model with its tokenizer, and facts for every result."""

    model: torch.nn.Module
    tokenizer: Any
    notes: tuple[str, ...]
    original_weights: str | None = None
    """Where the unquantized weights of a quantized model are."""


def packaged_folder(name: str) -> str:
    """The folder of a packaged model.

    Raises:
        ConfigurationError: its package is not installed.
    """
    config = PACKAGED[name](name=name)
    return SOURCES[type(config)](config).source


def load_model(
    config: ModelConfig, *, task_type: str, labels: tuple[str, ...], head_seed: int
) -> LoadedModel:
    """Load the model of `config`, with a head for `labels` drawn from `head_seed`.

    Raises:
        ConfigurationError: the model cannot be loaded as configured.
    """
    quantization.check_format(config.quantization)
    checkpoint = SOURCES[type(config)](config)
    model, tokenizer, notes = load_checkpoint(
        checkpoint,
        name=config.name,
        task_type=task_type,
        labels=labels,
        dropout=config.dropout,
        quantization=config.quantization,
        dtype=config.dtype,
        head_seed=head_seed,
    )
    if config.quantization is None:
        return LoadedModel(model, tokenizer, notes)
    notes = (*notes, f"base quantized by bitsandbytes: {config.quantization}")
    return LoadedModel(model, tokenizer, notes, quantization.original_folder(checkpoint))
