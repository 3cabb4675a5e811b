"""Weights of convolutions: a matrix on patches, stored as (out, channels, *kernel)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from lora_init.weights.float import FloatFormat
from lora_init.weights.format import WEIGHT, register_weight_format
from lora_init.weights.patches import CLASSES, TRANSPOSED, batched, kernels, patches, spread


class ConvolutionFormat(FloatFormat):
    """nn.Conv1d, nn.Conv2d or nn.Conv3d.

    A patch holds what the kernel covers at one position: (channels · kernel size) numbers. Each
    group of channels has its own patches and its own rows of the matrix.

    Args:
        cls: the class of the modules.
    """

    operation = "convolution"

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.name = cls.__name__

    def groups(self, module: nn.Module) -> int:
        return cast(_ConvNd, module).groups

    def orient(self, stored: Tensor) -> Float[Tensor, "out in"]:
        return stored.flatten(1)

    def stored(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> Tensor:
        return weight.reshape(cast(_ConvNd, module).weight.shape)

    def input_rows(self, module: nn.Module, x: Tensor) -> Float[Tensor, "positions in"]:
        conv = cast(_ConvNd, module)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padding = conv._reversed_padding_repeated_twice
        padded = functional.pad(batched(module, x), padding, mode=mode)
        rows = patches(padded, conv.kernel_size, conv.stride, conv.dilation)
        return rows.view(len(rows) * conv.groups, -1)

    def output_rows(self, module: nn.Module, y: Tensor) -> Float[Tensor, "positions out"]:
        return batched(module, y).movedim(1, -1).flatten(0, -2)

    def reading(self, module: nn.Module) -> Hashable:
        conv = cast(_ConvNd, module)
        padding, mode = str(conv.padding), conv.padding_mode
        return conv.kernel_size, conv.stride, padding, conv.dilation, mode, conv.groups


class TransposedConvolutionFormat(ConvolutionFormat):
    """nn.ConvTranspose1d, 2d or 3d with one group, stored as (channels, out, *kernel).

    A patch holds, for one position of the output, the inputs that contribute to it.
    """

    def refusal(self, module: nn.Module) -> str | None:
        if (groups := cast(_ConvNd, module).groups) != 1:
            return (
                f"is a {self.name} with groups={groups}, which is not supported: groups must be 1"
            )
        return super().refusal(module)

    def shape(self, module: nn.Module, name: str = WEIGHT) -> tuple[int, ...]:
        channels, rows, *kernel = getattr(module, name).shape
        return rows, channels * math.prod(kernel)

    def orient(self, stored: Tensor) -> Float[Tensor, "out in"]:
        return stored.transpose(0, 1).flatten(1)

    def stored(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> Tensor:
        return kernels(module, weight)

    def input_rows(self, module: nn.Module, x: Tensor) -> Float[Tensor, "positions in"]:
        conv = cast(_ConvNd, module)
        one = (1,) * len(conv.kernel_size)
        rows = patches(spread(module, batched(module, x)), conv.kernel_size, one, conv.dilation)
        sizes = conv.in_channels, *conv.kernel_size
        return rows.unflatten(1, sizes).flip(*range(2, len(sizes) + 1)).flatten(1)

    def reading(self, module: nn.Module) -> Hashable:
        return "transposed", cast(_ConvNd, module).output_padding, super().reading(module)


for _cls in CLASSES.values():
    register_weight_format(ConvolutionFormat(_cls))
for _cls in TRANSPOSED.values():
    register_weight_format(TransposedConvolutionFormat(_cls))
