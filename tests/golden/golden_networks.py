"""The two networks of the golden files, their inputs and their starts.

The writer and the tests share this module. It uses public names only, because it runs with the
code of 1d1a888 and with today's.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_init import LoraConfig, LoraModel, WithLoss, get_peft_model

DATA = Path(__file__).parent / "data"
CLASSES = 16
WORDS = 40


class Dense(nn.Module):
    """A tall and a wide linear layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Linear(32, 48)
        self.wide = nn.Linear(48, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.wide((4 * self.tall(x)).tanh()).tanh())


class Mixed(nn.Module):
    """One embedding, one Conv1D and one convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.project = Conv1D(24, 32)
        self.picture = nn.Conv2d(24, 40, 2)
        self.head = nn.Linear(40, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        pixels = self.project(self.words(x)).tanh().mT.unflatten(-1, (4, 4))
        return self.head(self.picture(pixels).tanh().mean((-2, -1)))


NETWORKS = {"dense": Dense, "mixed": Mixed}


@functools.cache
def load(name: str) -> dict[str, Tensor]:
    """All tensors of one golden file."""
    return load_file(DATA / f"{name}.safetensors")


def read(name: str, part: str = "") -> dict[str, Tensor]:
    """The tensors of one golden file whose names begin with `part/`, without it."""
    prefix = f"{part}/" if part else ""
    tensors = load(name)
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def read_json(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text())


def network(name: str) -> nn.Module:
    """One of the networks with its stored weights."""
    model = NETWORKS[name]()
    model.load_state_dict(read("networks", name))
    return model


def inputs(name: str) -> Tensor:
    """The inputs on which logits are compared."""
    return read("inputs", name)["x"]


def calibration(name: str) -> WithLoss:
    """The stored batches, with a loss for the methods that need gradients."""
    tensors = read("inputs", name)
    pairs = zip(tensors["calibration"], tensors["labels"], strict=True)
    return WithLoss([{"x": x, "labels": labels} for x, labels in pairs], loss)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def start(
    case: dict[str, Any], *, seed: int = 0, data: Any = None, cache: bool = False
) -> LoraModel:
    """Adapt a network as a case says.

    Args:
        case: its `network`, its `method`, and `settings` for `LoraConfig`.
        seed: of the initialization.
        data: calibration data; None takes the stored batches.
        cache: use the cache folder of the environment.
    """
    config = LoraConfig(init_lora_weights=case["method"], **case["settings"])
    if not config.initializer()[0].needs & {"inputs", "gradients"}:
        data = None
    elif data is None:
        data = calibration(case["network"])
    base = network(case["network"])
    return get_peft_model(base, config, calibration=data, seed=seed, cache=cache)


def factors(model: LoraModel) -> dict[str, Tensor]:
    """A and B of every layer, by `<layer>.lora_A` and `<layer>.lora_B`."""
    wanted = ("lora_A", "lora_B")
    return {
        key.removeprefix("base_model."): value.detach()
        for key, value in model.state_dict().items()
        if key.rpartition(".")[2] in wanted
    }


def bases(model: LoraModel) -> dict[str, Tensor]:
    """The weight of every adapted layer as the adapted model holds it, by the layer's name."""
    end = ".base_layer.weight"
    return {
        name.removesuffix(end): value.detach()
        for name, value in model.base_model.named_parameters()
        if name.endswith(end)
    }


def arithmetic() -> Tensor:
    """What this machine computes from stored weights, to the last bit, with torch alone."""
    weight = read("networks", "dense")["tall.weight"]
    gram = weight.mT @ weight
    sums = [weight.log_softmax(1), weight.sum(0), weight.double().square().sum(1).float()]
    parts = [gram, weight.tanh(), *sums, *torch.linalg.svd(weight)[1:], *torch.linalg.eigh(gram)]
    return torch.cat([part.flatten() for part in parts])


@functools.cache
def computes_as_the_writer() -> bool:
    """Whether this machine and this torch round as those that wrote the golden files."""
    return torch.equal(arithmetic(), read("inputs", "arithmetic")["probe"])


def tolerance() -> float:
    """The relative difference allowed in factors; the larger one covers another CPU's rounding."""
    return 1e-6 if computes_as_the_writer() else 3e-5


def assert_close(found: Tensor, expected: Tensor, name: str, limit: float | None = None) -> None:
    """Compare shapes, and the distance relative to the norm with `limit` or `tolerance()`."""
    assert found.shape == expected.shape, name
    distance = (found.double() - expected.double()).norm()
    size = expected.double().norm()
    allowed = tolerance() if limit is None else limit
    assert distance <= allowed * size, f"{name}: relative difference {distance / size:.1e}"
