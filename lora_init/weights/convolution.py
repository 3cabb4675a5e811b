"""Weights of convolutions: a matrix on patches, stored as (out, channels, *kernel)."""

from __future__ import annotations

from collections.abc import Hashable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_init.weights.float import FloatFormat
from lora_init.weights.patches import batched, patches


class ConvolutionFormat(FloatFormat):
    """nn.Conv1d, nn.Conv2d or nn.Conv3d with one group.

    A patch holds what the kernel covers at one position: (channels · kernel size) numbers.

    Args:
        cls: the class of the modules.
    """

    operation = "convolution"

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.name = cls.__name__

    def refusal(self, module: nn.Module) -> str | None:
        if module.groups != 1:
            return (
                f"is a {self.name} with groups={module.groups}, which is not supported: groups "
                "must be 1"
            )
        return super().refusal(module)

    def orient(self, stored: Tensor) -> Float[Tensor, "out in"]:
        return stored.flatten(1)

    def stored(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> Tensor:
        return weight.reshape(module.weight.shape)

    def input_rows(self, module: nn.Module, x: Tensor) -> Float[Tensor, "positions in"]:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = module._reversed_padding_repeated_twice
        padded = functional.pad(batched(module, x), padding, mode=mode)
        return patches(padded, module.kernel_size, module.stride, module.dilation)

    def output_rows(self, module: nn.Module, y: Tensor) -> Float[Tensor, "positions out"]:
        return batched(module, y).movedim(1, -1).flatten(0, -2)

    def reading(self, module: nn.Module) -> Hashable:
        padding, mode = str(module.padding), module.padding_mode
        return module.kernel_size, module.stride, padding, module.dilation, mode
