"""Networks of two or three layers of one module type, for what needs no architecture.

`Case` builds them, with their inputs and their calibration data.
"""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from models import Batches, spread_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

SHAPES = {"square": (32, 32), "tall": (56, 32), "wide": (24, 56)}
# What bitsandbytes packs for a CPU without a loss: whole blocks of 64 a row, groups of 32 rows.
PACKED_SHAPES = {"square": (64, 64), "tall": (128, 64), "wide": (32, 128)}
CONVOLUTION_SHAPES = {"square": (8, 36), "strided": (12, 48), "dilated": (8, 108)}
IN_CHANNELS = {"square": 4, "strided": 8, "dilated": 12}
EMBEDDING_SHAPES = {"words": (16, 40), "kinds": (16, 12)}
PACKED_KINDS = ("Linear4bit", "Linear8bitLt")
NETWORK_KINDS = ("Linear", "Conv1D", "Conv2d", "Embedding", *PACKED_KINDS)
"""The module types of `Case`. tests/test_support.py has a cell for each method on every type."""


class Chain(nn.Module):
    """square, tall, wide: an out x in for every case, of `SHAPES` or, if packed, `PACKED_SHAPES`.

    A packed chain and a float one of the same shapes and seed have the same original weights.
    """

    def __init__(self, kind="Linear", dtype=torch.float32, seed=0, shapes=None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = shapes or (PACKED_SHAPES if kind in PACKED_KINDS else SHAPES)
        for name, (rows, columns) in shapes.items():
            weight = spread_weight(rows, columns, generator)
            bias = 0.1 * torch.randn(rows, generator=generator)
            self.add_module(name, linear(kind, weight, bias))
        if kind not in PACKED_KINDS:
            self.to(dtype)

    def forward(self, x):
        return self.wide(torch.tanh(self.tall(torch.tanh(self.square(x)))))


def linear(kind, weight, bias=None, **settings):
    """A module of a linear type that holds `weight` (out, in); settings are bitsandbytes'."""
    rows, columns = weight.shape
    with_bias = bias is not None
    if kind == "Linear":
        module = nn.Linear(columns, rows, bias=with_bias)
    elif kind == "Conv1D":
        module = Conv1D(rows, columns)
        weight = weight.T
    elif kind == "Linear4bit":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        settings = {"quant_type": "nf4", "compress_statistics": True} | settings
        module = bitsandbytes.nn.Linear4bit(columns, rows, bias=with_bias, **settings)
    else:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        settings = {"has_fp16_weights": False} | settings
        module = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=with_bias, **settings)
    with torch.no_grad():
        module.weight.copy_(weight)
        if with_bias:
            module.bias.copy_(bias)
    return module.to("cpu")  # which is when bitsandbytes quantizes


class Pictures(nn.Module):
    """Three convolutions: padded; strided with a flat kernel; dilated, reflecting, without bias."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.square = nn.Conv2d(4, 8, 3, padding=1)
        self.strided = nn.Conv2d(
            8, 12, (3, 2), stride=(2, 1), padding=(0, 1), padding_mode="circular"
        )
        self.dilated = nn.Conv2d(
            12, 8, 3, dilation=2, padding="same", padding_mode="reflect", bias=False
        )
        with torch.no_grad():
            for name, shape in CONVOLUTION_SHAPES.items():
                module = self.get_submodule(name)
                module.weight.copy_(spread_weight(*shape, generator).view(module.weight.shape))
                if module.bias is not None:
                    module.bias.copy_(0.1 * torch.randn(shape[0], generator=generator))
        self.to(dtype)

    def forward(self, x):
        return self.dilated(torch.tanh(self.strided(torch.tanh(self.square(x)))))


class Words(nn.Module):
    """Two embeddings: of many entries, one of them padding, and of fewer than its width."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.words = nn.Embedding(40, 16, padding_idx=0)
        self.kinds = nn.Embedding(12, 16)
        with torch.no_grad():
            for name, shape in EMBEDDING_SHAPES.items():
                self.get_submodule(name).weight.copy_(spread_weight(*shape, generator).T)
        self.to(dtype)

    def forward(self, ids):
        return torch.tanh(self.words(ids)) + torch.tanh(self.kinds(ids % 12))


class Case(NamedTuple):
    """A base to adapt: a network whose layers are all of one module type, and its inputs."""

    kind: str = "Linear"
    dtype: torch.dtype = torch.float32

    def __str__(self):
        return f"{self.kind}-{str(self.dtype)[6:]}"

    @property
    def packed(self):
        return self.kind in PACKED_KINDS

    @property
    def shapes(self):
        """The layers' (out, in), in the model's order."""
        if self.packed:
            return PACKED_SHAPES
        return {"Conv2d": CONVOLUTION_SHAPES, "Embedding": EMBEDDING_SHAPES}.get(self.kind, SHAPES)

    def build(self, seed=0):
        return copy.deepcopy(built(self, seed))

    def originals(self, seed=0):
        """The weights that a packed network was quantized from, else None."""
        return Chain(seed=seed, shapes=PACKED_SHAPES).state_dict() if self.packed else None

    def inputs(self, rows=30, seed=1):
        """Inputs of the whole network."""
        return self.layer_inputs(next(iter(self.shapes)), rows, seed)

    def layer_inputs(self, name, rows=50, seed=21):
        columns = self.shapes[name][1]
        if self.kind == "Embedding":
            generator = torch.Generator().manual_seed(seed)
            return torch.randint(columns, (rows, 5), generator=generator)
        if self.kind == "Conv2d":
            channels = IN_CHANNELS[name]
            size = 8 * 7 * channels
            return chain_inputs(rows // 5, size, self.dtype, seed).view(-1, channels, 8, 7)
        return chain_inputs(rows, columns, self.dtype, seed)

    def calibration(self):
        return Batches(self.inputs(40, seed) for seed in (11, 12, 13))


@functools.cache  # a copy takes a third of the time
def built(case, seed):
    with torch.random.fork_rng(devices=[]):  # the global draws do not depend on who builds first
        if case.kind == "Conv2d":
            return Pictures(case.dtype, seed)
        if case.kind == "Embedding":
            return Words(case.dtype, seed)
        return Chain(case.kind, case.dtype, seed)


def chain_inputs(rows, columns=SHAPES["square"][1], dtype=torch.float32, seed=1):
    """Correlated inputs with a mean, as activations are; shape (rows, columns)."""
    return drawn_inputs(rows, columns, seed).to(dtype, copy=True)


@functools.cache  # the mixing matrix of a few hundred columns takes longer than many a test
def drawn_inputs(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = spread_weight(columns, columns, generator)
    mean = 0.3 * torch.randn(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mix + mean


def chain_calibration(dtype=torch.float32):
    return Batches(chain_inputs(40, dtype=dtype, seed=seed) for seed in (11, 12, 13))
