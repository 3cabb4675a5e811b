"""Weights of nn.Conv2d: a matrix on image patches, stored as (out, channels, height, width)."""

from __future__ import annotations

from collections.abc import Hashable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_init.weights.float import FloatFormat


class Conv2dFormat(FloatFormat):
    """nn.Conv2d with one group."""

    name = "Conv2d"
    cls = nn.Conv2d
    operation = "convolution"

    def refusal(self, module: nn.Module) -> str | None:
        if module.groups != 1:
            return (
                f"is a Conv2d with groups={module.groups}, which is not supported: groups must be 1"
            )
        return super().refusal(module)

    def orient(self, stored: Tensor) -> Float[Tensor, "out in"]:
        return stored.flatten(1)

    def stored(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> Tensor:
        return weight.reshape(module.weight.shape)

    def input_rows(self, module: nn.Module, x: Tensor) -> Float[Tensor, "positions in"]:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        if padded.ndim == 3:
            padded = padded[None]
        patches = functional.unfold(
            padded, module.kernel_size, dilation=module.dilation, stride=module.stride
        )
        return patches.transpose(1, 2).flatten(0, 1)

    def output_rows(self, module: nn.Module, y: Tensor) -> Float[Tensor, "positions out"]:
        if y.ndim == 3:
            y = y[None]
        return y.flatten(2).transpose(1, 2).flatten(0, 1)

    def reading(self, module: nn.Module) -> Hashable:
        padding, mode = str(module.padding), module.padding_mode
        return module.kernel_size, module.stride, padding, module.dilation, mode
