"""Pretrained models to measure on, and their linear layers by kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.errors import ConfigurationError
from experiments.models import load_model, local, minilm, smollm2
from lora_init.modules import oriented_weight

MODELS = {"minilm": minilm.MiniLM, "smollm2": smollm2.SmolLM2}
DESCRIBED = {
    "minilm": "all-MiniLM-L6-v2 (BERT, 22.7M parameters, width 384, float32)",
    "smollm2": "SmolLM2-135M-Instruct (Llama, 134.5M parameters, width 576, weights converted from "
    "4-bit values)",
}
SHORT = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M"}
BLOCK = re.compile(r"\.(\d+)\.")


def short_name(model: str) -> str:
    """What a model is called wherever its rows are shown."""
    return SHORT.get(model, model)


def file_name(model: str) -> str:
    """A model's name, or its path, as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", model.lower()).strip("_")


@dataclass(frozen=True)
class Layer:
    """One linear layer of a model.

    Attributes:
        name: its qualified name in the model.
        block: the number of its transformer block.
        kind: what it does, as the model calls it: "q_proj", "attention.output.dense", …
    """

    name: str
    block: int
    kind: str


@dataclass(frozen=True)
class Subject:
    """A pretrained model with its tokenizer.

    Attributes:
        described: size and origin, for results.
    """

    name: str
    described: str
    model: nn.Module
    tokenizer: Any

    @property
    def short(self) -> str:
        return short_name(self.name)

    @cached_property
    def layers(self) -> list[Layer]:
        """The linear layers inside transformer blocks, in the model's order."""
        return [
            Layer(name, int(found[1]), name[found.end() :])
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and (found := BLOCK.search(name))
        ]

    def every(self, step: int) -> list[Layer]:
        """The layers of every `step`-th block, beginning in the middle of the first `step`."""
        return [layer for layer in self.layers if layer.block % step == step // 2]

    def weight(self, layer: Layer) -> Float[Tensor, "out in"]:
        """Its weight, float32, as (out, in); not a copy where it is that already."""
        return oriented_weight(self.model.get_submodule(layer.name)).detach().float()

    def weights(self, layers: list[Layer]) -> Iterator[tuple[Layer, Float[Tensor, "out in"]]]:
        for layer in layers:
            yield layer, self.weight(layer)


def load_subject(
    name: str, *, task_type: str = "CAUSAL_LM", labels: tuple[str, ...] = (), head_seed: int = 0
) -> Subject:
    """Load a packaged model by its name, or any folder or hub name by its path.

    Args:
        name: "minilm", "smollm2", a folder, or a hub name such as `organisation/model`.
        task_type: "SEQ_CLS", with a head for `labels` drawn from `head_seed`; or "CAUSAL_LM", of
            which an encoder has no head: minilm is then loaded with a head of two labels.

    Raises:
        ConfigurationError: no such model, or one that cannot be loaded.
    """
    if name in MODELS:
        config = MODELS[name]()
    elif "/" in name or name.startswith((".", "~")):
        config = local.LocalModel(path=name)
    else:
        known = ", ".join(MODELS)
        raise ConfigurationError(f"model={name!r}; allowed are {known}, a folder and a hub name")
    if name == "minilm" and task_type == "CAUSAL_LM":
        task_type = "SEQ_CLS"
    loaded = load_model(
        config, task_type=task_type, labels=labels or ("a", "b"), head_seed=head_seed
    )
    parameters = sum(p.numel() for p in loaded.model.parameters()) / 1e6
    described = DESCRIBED.get(name, f"{name} ({parameters:.4g}M parameters)")
    return Subject(name, described, loaded.model.eval(), loaded.tokenizer)


def place(device: str) -> torch.device:
    """The device that a setting asks for.

    Raises:
        ConfigurationError: "cuda" where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device=cuda: torch sees no CUDA device; set device=cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
