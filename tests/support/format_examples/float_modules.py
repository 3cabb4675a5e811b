"""Modules that store a floating-point weight, and bitsandbytes' packed layers."""

import functools

import torch
from networks import linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_init.weights.patches import CLASSES, TRANSPOSED


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolution(dimensions):
    """Another size, stride and dilation along each dimension, and reflected borders."""
    along = slice(dimensions)
    module = CLASSES[dimensions](
        4, 8, (3, 2, 1)[along], stride=(2, 1, 2)[along], padding=(2, 1, 1)[along],
        dilation=(2, 1, 1)[along], padding_mode="reflect",
    )  # fmt: skip
    return module, draws(2, 4, *(9, 8, 5)[along])


def upsampling(dimensions):
    """A transposed convolution; one of its paddings is wider than its kernel reaches."""
    along = slice(dimensions)
    module = TRANSPOSED[dimensions](
        4, 8, (3, 2, 1)[along], stride=(2, 3, 2)[along], padding=(1, 2, 0)[along],
        dilation=(2, 1, 1)[along], output_padding=(1, 2, 0)[along],
    )  # fmt: skip
    return module, draws(2, 4, *(5, 4, 3)[along])


class Logits(nn.Linear):
    """A router that does not select, so that its output is one tensor."""

    num_experts = 5

    def __init__(self):
        super().__init__(24, self.num_experts)


def packed(kind):
    module = linear(kind, draws(32, 64) / 8, draws(32, seed=1)).requires_grad_(False)
    return module, draws(2, 3, 64)


EXAMPLES = {
    "Linear": lambda: (nn.Linear(64, 32), draws(2, 3, 64)),
    "Conv1D": lambda: (Conv1D(32, 64), draws(2, 3, 64)),
    "Embedding": lambda: (nn.Embedding(48, 32), torch.arange(48).view(6, 8)),
    "Router": lambda: (Logits(), draws(2, 3, 24)),
    "Linear4bit": functools.partial(packed, "Linear4bit"),
    "Linear8bitLt": functools.partial(packed, "Linear8bitLt"),
}
EXAMPLES |= {f"Conv{n}d": functools.partial(convolution, n) for n in CLASSES}
EXAMPLES |= {f"ConvTranspose{n}d": functools.partial(upsampling, n) for n in TRANSPOSED}
