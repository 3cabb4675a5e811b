"""Small networks of one module type each, with inputs and calibration data.

Weights have decaying spectra: with a flat spectrum a decomposition that takes the wrong triplets
goes unnoticed. Several layers share a shape, so that an accelerator works on a stack of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_init import Initializer

KINDS = ("Linear", "Conv1D", "Conv2d", "Embedding")
PACKED = ("Linear4bit", "Linear8bitLt")
ROWS = 40


@dataclass(frozen=True)
class Specimen:
    """A network to adapt.

    Attributes:
        kind: the module type of all layers.
        dtype: of its weights.
        width: of the equal layers; the last layer is wider. A multiple of 64 if packed.
    """

    kind: str
    dtype: torch.dtype
    width: int = 96

    def __str__(self) -> str:
        return f"{self.kind} {str(self.dtype)[6:]} {self.width}"

    @property
    def packed(self) -> bool:
        return self.kind in PACKED

    def build(self) -> nn.Module:
        """The network on the CPU, with the same weights at every call."""
        generator = torch.Generator().manual_seed(0)
        width = self.width
        if self.kind == "Embedding":
            made: nn.Module = Words(width, generator)
        elif self.kind == "Conv2d":
            made = Chain(
                [
                    convolution(nn.Conv2d(4, 4, 3, padding=1), generator),
                    convolution(nn.Conv2d(4, 4, 3, padding=1), generator),
                    convolution(nn.Conv2d(4, 12, 3, stride=2, bias=False), generator),
                ]
            )
        else:
            shapes = [(width, width)] * 2 + [(3 * width // 2, width)]
            weights = [decaying(*shape, generator) for shape in shapes]
            made = Chain([linear(self.kind, weight, self.dtype) for weight in weights])
        return made if self.packed else made.to(self.dtype)

    def originals(self) -> dict[str, Tensor] | None:
        """The weights before quantization of a packed network; None for others."""
        if not self.packed:
            return None
        return Specimen("Linear", torch.float32, self.width).build().state_dict()

    def inputs(self, seed: int = 1, rows: int = ROWS) -> Tensor:
        """Inputs of the network: correlated, with a mean, as activations are."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "Embedding":
            return torch.randint(3 * self.width, (rows, 5), generator=generator)
        if self.kind == "Conv2d":
            drawn = torch.randn(rows // 5, 4, 8, 8, generator=generator)
            return (drawn + drawn.roll(1, -1) + 0.3).to(self.dtype)
        mix = decaying(self.width, self.width, torch.Generator().manual_seed(7))
        drawn = torch.randn(rows, self.width, generator=generator)
        return (drawn @ mix + 0.3).to(self.dtype)

    def calibration(self, device: torch.device | str) -> Batches:
        """More rows than the network is wide, so that the inputs span all directions."""
        rows = max(ROWS, 2 * self.width) if self.kind != "Conv2d" else ROWS
        return Batches(self.inputs(seed, rows).to(device) for seed in (11, 12))


def data_of(spec: Initializer, batches: list) -> list | dict[str, list] | None:
    """The batches as a method takes them: shared out where it compares sets; None for no data."""
    request = spec.request(spec.options())
    if request is None or not request.sets:
        return None if request is None else batches
    count = len(request.sets)
    return {name: type(batches)(batches[n::count]) for n, name in enumerate(request.sets)}


class Batches(list):
    """Calibration batches with a loss for methods that need gradients: the mean square output."""

    @staticmethod
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).float().square().mean()


class Chain(nn.Module):
    """Layers one after another, with tanh between them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class Words(nn.Module):
    """The sum of two equal embeddings."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Embedding(3 * width, width) for _ in range(2)])
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(decaying(width, 3 * width, generator).T)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layers[0](ids)) + torch.tanh(self.layers[1](ids))


@torch.no_grad()
def convolution(module: nn.Conv2d, generator: torch.Generator) -> nn.Conv2d:
    """The module with a weight of decaying spectrum."""
    rows, *rest = module.weight.shape
    module.weight.copy_(decaying(rows, math.prod(rest), generator).view_as(module.weight))
    return module


@torch.no_grad()
def linear(kind: str, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """A linear module of this kind with the given weight (out, in)."""
    rows, columns = weight.shape
    if kind == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        module, weight = Conv1D(rows, columns), weight.T
    elif kind == "Linear":
        module = nn.Linear(columns, rows)
    else:
        import bitsandbytes

        settings = {"compute_dtype": dtype} if kind == "Linear4bit" else {"has_fp16_weights": False}
        module = getattr(bitsandbytes.nn, kind)(columns, rows, bias=False, **settings)
    module.weight.copy_(weight)
    if getattr(module, "bias", None) is not None:
        module.bias.fill_(0.1)
    return module.to("cpu")  # quantizes a packed module


def decaying(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix with singular values 1, 2^-0.7, 3^-0.7, … and Frobenius norm sqrt(rows)."""
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator))[0]
    values = torch.arange(1, size + 1) ** -0.7
    return (left * values) @ right.T * (math.sqrt(rows) / values.norm())
