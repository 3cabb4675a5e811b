"""Convolutions of one, two and three dimensions, as products of kernels with patches."""

from __future__ import annotations

from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
FUNCTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED_FUNCTIONS = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
"""torch's convolutions by number of dimensions."""


def is_transposed(module: nn.Module) -> bool:
    return isinstance(module, tuple(TRANSPOSED.values()))


def torch_class(module: nn.Module) -> type[nn.Module]:
    """The class of torch from which a convolution's class derives."""
    classes = TRANSPOSED if is_transposed(module) else CLASSES
    return classes[cast(nn.Conv1d, module).weight.ndim - 2]


def convolve(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The output of a convolution with another weight, of any number of kernels.

    Stride, dilation, padding and padding mode are those of the module.
    """
    dimensions = weight.ndim - 2
    if not is_transposed(module):
        return CLASSES[dimensions]._conv_forward(module, x, weight, bias)
    return TRANSPOSED_FUNCTIONS[dimensions](
        x, weight, bias, module.stride, module.padding, module.output_padding, module.groups,
        module.dilation,
    )  # fmt: skip


def kernels(module: Any, matrix: Float[Tensor, "kernels in"]) -> Tensor:
    """The rows of a matrix as kernels, in the layout of the module's weight."""
    if is_transposed(module):
        sizes = module.in_channels, *module.kernel_size
        return matrix.unflatten(1, sizes).transpose(0, 1)
    return matrix.unflatten(1, module.weight.shape[1:])


def pointwise(
    module: nn.Module, x: Tensor, matrix: Float[Tensor, "out channels_of_group"]
) -> Tensor:
    """The product of a matrix with the channels at each position of a convolution's output.

    With groups, the rows of a group are multiplied by the channels of that group.
    """
    convolution = cast(nn.Conv1d, module)
    dimensions = convolution.weight.ndim - 2
    kernels = matrix.view(*matrix.shape, *[1] * dimensions)
    return FUNCTIONS[dimensions](x, kernels, groups=convolution.groups)


def convolve_all_channels(
    module: Any, x: Tensor, matrix: Float[Tensor, "kernels all_channels"]
) -> Tensor:
    """The output of kernels that read the channels of all groups, as PEFT's lora_A does.

    Stride and padding are those of the module. Dilation and padding mode do not apply, as in PEFT.
    """
    dense = matrix.unflatten(1, (-1, *module.kernel_size))
    return FUNCTIONS[len(module.kernel_size)](x, dense, None, module.stride, module.padding)


def batched(module: nn.Module, x: Tensor) -> Float[Tensor, "batch channels *positions"]:
    """The input or output of a convolution, with a batch dimension."""
    return x[None] if x.ndim < cast(nn.Conv1d, module).weight.ndim else x


def spread(module: Any, x: Tensor) -> Float[Tensor, "batch channels *positions"]:
    """The padded input whose convolution with flipped kernels is the transposed convolution of x.

    Neighbors are `stride` apart, with zeros between them.
    """
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], module.stride, strict=True)]
    spaced = x.new_zeros(*x.shape[:2], *sizes)
    spaced[(..., *(slice(None, None, step) for step in module.stride))] = x
    padding: list[int] = []
    geometry = zip(
        module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True
    )
    for size, gap, cut, more in reversed(list(geometry)):
        border = gap * (size - 1) - cut
        padding += [border, border + more]
    return functional.pad(spaced, padding)  # a negative number removes positions


def patches(
    x: Float[Tensor, "batch channels *positions"],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Float[Tensor, "patches in"]:
    """All patches of a padded input, in the order of the outputs: in = channels · kernel size."""
    dimensions = len(kernel_size)
    geometry = zip(kernel_size, stride, dilation, strict=True)
    for dimension, (size, step, gap) in enumerate(geometry, start=2):
        x = x.unfold(dimension, gap * (size - 1) + 1, step)[..., ::gap]
    # (batch, channels, *positions, *kernel): put the channels behind the positions.
    return x.movedim(1, dimensions + 1).flatten(0, dimensions).flatten(1)
