"""Small networks of one module type each, their inputs, and calibration data.

Weights have decaying spectra: flat ones hide a decomposition that takes the wrong triplets. Several
layers share a shape, so that an accelerator works on a stack of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

KINDS = ("Linear", "Conv1D", "Conv2d", "Embedding")
PACKED = ("Linear4bit", "Linear8bitLt")
ROWS = 40


@dataclass(frozen=True)
class Specimen:
    """A network to adapt.

    Attributes:
        kind: the module type of all layers.
        dtype: of its weights.
        width: of the layers that are alike; a last one is wider. Whole blocks of 64 if packed.
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
        """The network on the CPU, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        width = self.width
        if self.kind == "Embedding":
            made: nn.Module = Words(width, generator)
        elif self.kind == "Conv2d":
            made = Pictures(generator)
        else:
            shapes = [(width, width)] * 2 + [(3 * width // 2, width)]
            weights = [decaying(*shape, generator) for shape in shapes]
            made = Chain([linear(self.kind, weight, self.dtype) for weight in weights])
        return made if self.packed else made.to(self.dtype)

    def originals(self) -> dict[str, Tensor] | None:
        """The weights that a packed network was quantized from; None for a float one."""
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
        """More rows than the network is wide, so that no direction is unseen."""
        rows = max(ROWS, 2 * self.width) if self.kind != "Conv2d" else ROWS
        return Batches(self.inputs(seed, rows).to(device) for seed in (11, 12))


class Batches(list):
    """Calibration batches with a loss for methods that read gradients: the mean square output."""

    @staticmethod
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).float().square().mean()


class Chain(nn.Module):
    """Linear layers one after another; float inputs of any dtype are cast to a packed layer's."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class Pictures(nn.Module):
    """Two convolutions that are alike, and one that is strided."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Conv2d(4, 12, 3, stride=2, bias=False),
            ]
        )
        with torch.no_grad():
            for layer in self.layers:
                rows, *rest = layer.weight.shape
                weight = decaying(rows, math.prod(rest), generator)
                layer.weight.copy_(weight.view_as(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class Words(nn.Module):
    """Two embeddings that are alike."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Embedding(3 * width, width) for _ in range(2)])
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(decaying(width, 3 * width, generator).T)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layers[0](ids)) + torch.tanh(self.layers[1](ids))


def linear(kind: str, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """A linear module of this kind that holds the weight (out, in)."""
    rows, columns = weight.shape
    if kind == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        module = Conv1D(rows, columns)
        weight = weight.T
    elif kind == "Linear":
        module = nn.Linear(columns, rows)
    else:
        import bitsandbytes

        settings = {"compute_dtype": dtype} if kind == "Linear4bit" else {"has_fp16_weights": False}
        module = getattr(bitsandbytes.nn, kind)(columns, rows, bias=False, **settings)
    with torch.no_grad():
        module.weight.copy_(weight)
        if getattr(module, "bias", None) is not None:
            module.bias.fill_(0.1)
    return module.to("cpu")  # which quantizes a packed one


def decaying(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Singular values 1, 2^-0.7, 3^-0.7, …; Frobenius norm sqrt(rows)."""
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator))[0]
    values = torch.arange(1, size + 1) ** -0.7
    weight = (left * values) @ right.T
    return weight * (math.sqrt(rows) / values.norm())
