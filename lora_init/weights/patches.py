"""Convolutions of one, two and three dimensions, as products of kernels with patches."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FUNCTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
"""torch's convolutions by number of dimensions."""


def convolve(module: nn.Module, x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
    """The output of a convolution with other kernels, of any number.

    Stride, dilation, padding and padding mode are those of the module.
    """
    return CLASSES[kernels.ndim - 2]._conv_forward(module, x, kernels, bias)


def pointwise(
    module: nn.Module, x: Tensor, matrix: Float[Tensor, "out channels_of_group"]
) -> Tensor:
    """The product of a matrix with the channels at each position of a convolution's output.

    With groups, the rows of a group are multiplied by the channels of that group.
    """
    dimensions = module.weight.ndim - 2
    kernels = matrix.view(*matrix.shape, *[1] * dimensions)
    return FUNCTIONS[dimensions](x, kernels, groups=module.groups)


def batched(module: nn.Module, x: Tensor) -> Float[Tensor, "batch channels *positions"]:
    """The input or output of a convolution, with a batch dimension."""
    return x[None] if x.ndim < module.weight.ndim else x


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
