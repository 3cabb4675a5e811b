"""Weights of convolutions: a matrix on patches, stored as (out, channels, *kernel)."""

from __future__ import annotations

import math
from collections.abc import Hashable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

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
        return module.groups

    def orient(self, stored: Tensor) -> Float[Tensor, "out in"]:
        return stored.flatten(1)

    def stored(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> Tensor:
        return weight.reshape(module.weight.shape)

    def input_rows(self, module: nn.Module, x: Tensor) -> Float[Tensor, "positions in"]:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = module._reversed_padding_repeated_twice
        padded = functional.pad(batched(module, x), padding, mode=mode)
        rows = patches(padded, module.kernel_size, module.stride, module.dilation)
        return rows.view(len(rows) * module.groups, -1)

    def output_rows(self, module: nn.Module, y: Tensor) -> Float[Tensor, "positions out"]:
        return batched(module, y).movedim(1, -1).flatten(0, -2)

    def reading(self, module: nn.Module) -> Hashable:
        padding, mode = str(module.padding), module.padding_mode
        return module.kernel_size, module.stride, padding, module.dilation, mode, module.groups


class TransposedConvolutionFormat(ConvolutionFormat):
    """nn.ConvTranspose1d, 2d or 3d with one group, stored as (channels, out, *kernel).

    A patch holds, for one position of the output, the inputs that contribute to it.
    """

    def refusal(self, module: nn.Module) -> str | None:
        if module.groups != 1:
            return (
                f"is a {self.name} with groups={module.groups}, which is not supported: groups "
                "must be 1"
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
        one = (1,) * len(module.kernel_size)
        rows = patches(spread(module, batched(module, x)), module.kernel_size, one, module.dilation)
        sizes = module.in_channels, *module.kernel_size
        return rows.unflatten(1, sizes).flip(*range(2, len(sizes) + 1)).flatten(1)

    def reading(self, module: nn.Module) -> Hashable:
        return "transposed", module.output_padding, super().reading(module)


for _cls in CLASSES.values():
    register_weight_format(ConvolutionFormat(_cls))
for _cls in TRANSPOSED.values():
    register_weight_format(TransposedConvolutionFormat(_cls))
