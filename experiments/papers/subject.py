"""Pretrained models for measurements, and their linear layers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights.kinds import oriented_weight

from ..errors import ConfigurationError
from ..models import PACKAGED, load_model, local

DESCRIBED = {
    "minilm": "all-MiniLM-L6-v2 (BERT, 22.7M parameters, width 384, float32)",
    "smollm2": "SmolLM2-135M-Instruct (Llama, 134.5M parameters, width 576, weights converted from "
    "4-bit values)",
}
SHORT = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M"}
BLOCK = re.compile(r"\.(\d+)\.")


def short_name(model: str) -> str:
    """The name of a model in tables and figures."""
    return SHORT.get(model, model)


def file_name(model: str) -> str:
    """A model's name or path as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", model.lower()).strip("_")


@dataclass(frozen=True)
class Layer:
    """One linear layer of a model.

    Attributes:
        name: its qualified name in the model.
        block: the number of its transformer block.
        kind: its name in the block: "q_proj", "attention.output.dense", …
    """

    name: str
    block: int
    kind: str


@dataclass(frozen=True)
class Subject:
    """A pretrained model with its tokenizer.

    Attributes:
        described: size and origin in words.
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
        """The linear layers of the transformer blocks, in the order of the model."""
        return [
            Layer(name, int(found[1]), name[found.end() :])
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and (found := BLOCK.search(name))
        ]

    def every(self, step: int) -> list[Layer]:
        """The layers of every `step`-th block, from the middle of the first `step` blocks on."""
        return [layer for layer in self.layers if layer.block % step == step // 2]

    def weight(self, layer: Layer) -> Float[Tensor, "out in"]:
        """The weight of a layer in float32 as (out, in), not copied if it already is."""
        return oriented_weight(self.model.get_submodule(layer.name)).detach().float()

    def weights(self, layers: list[Layer]) -> Iterator[tuple[Layer, Float[Tensor, "out in"]]]:
        for layer in layers:
            yield layer, self.weight(layer)


def load_subject(
    name: str, *, task_type: str = "CAUSAL_LM", labels: tuple[str, ...] = (), head_seed: int = 0
) -> Subject:
    """Load a packaged model by name, or another one by its folder or hub name.

    Args:
        name: "minilm", "smollm2", a folder, or a hub name such as `organisation/model`.
        task_type: "SEQ_CLS" adds a head for `labels`, drawn from `head_seed`. "CAUSAL_LM" has no
            head for an encoder, so minilm then gets a head of two labels.

    Raises:
        ConfigurationError: the model does not exist or cannot be loaded.
    """
    if name in PACKAGED:
        config = PACKAGED[name](name=name)
    elif "/" in name or name.startswith((".", "~")):
        config = local.LocalModel(path=name)
    else:
        known = ", ".join(PACKAGED)
        raise ConfigurationError(
            f"model={name!r} is not supported: must be one of {known}, a folder, or a hub name."
        )
    if name == "minilm" and task_type == "CAUSAL_LM":
        task_type = "SEQ_CLS"
    loaded = load_model(
        config, task_type=task_type, labels=labels or ("a", "b"), head_seed=head_seed
    )
    parameters = sum(p.numel() for p in loaded.model.parameters()) / 1e6
    described = DESCRIBED.get(name, f"{name} ({parameters:.4g}M parameters)")
    return Subject(name, described, loaded.model.eval(), loaded.tokenizer)


@contextmanager
def restored(weights: Mapping[str, Float[Tensor, "out in"]]) -> Iterator[None]:
    """Afterwards the weights are what they were before, to the bit."""
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])


@contextmanager
def moved(
    weights: Mapping[str, Float[Tensor, "out in"]],
    updates: Mapping[str, Float[Tensor, "out in"]],
    factor: float = 1.0,
) -> Iterator[None]:
    """The weights plus `factor` times their updates, while the context lasts."""
    with restored(weights):
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_(updates[name], alpha=factor)
        yield


def place(device: str) -> torch.device:
    """The device of an option.

    Raises:
        ConfigurationError: "cuda" without a CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "device=cuda is not supported here: torch finds no CUDA device. Set device=cpu."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result; the device's queue is empty before and after."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - began, result
