"""Adapted convolutions and transposed convolutions of one, two and three dimensions."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lora_init.factors import block_matrix, matrix_blocks
from lora_init.layers.base import LoraLayer, common_dtype
from lora_init.weights.offload import is_hooked
from lora_init.weights.patches import (
    convolve,
    convolve_all_channels,
    kernels,
    pointwise,
    torch_class,
)


class ConvolutionLayer(LoraLayer):
    """``h = base(x) + s B (A * x)``: the rows of A are kernels of the base's size, B is pointwise.

    A has shape (rank, channels·kernel size) here and (rank, channels, *kernel) in files.

    With groups, each group has its own factors of rank / groups: its kernels in A read its channels
    and its rows of B, (out, rank / groups), read what these kernels return.

    In a file that PEFT has trained, the kernels read the channels of all groups: A has shape
    (rank, all channels·kernel size). Such a layer computes and trains what PEFT's does. Its sum
    with the base is not a grouped convolution, so it has no effective weight and cannot be merged.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        lora_A: Float[Tensor, "rank in"],
        lora_B: Float[Tensor, "out rank"],
        **settings: Any,
    ) -> None:
        super().__init__(base_layer, lora_A, lora_B, **settings)
        self.lora_B = nn.Parameter(matrix_blocks(lora_B, self.base_layer.groups).contiguous())

    @property
    def output_factor(self) -> Float[Tensor, "out rank"]:
        """B as a matrix, with zeros between the groups."""
        return block_matrix(super().output_factor, self.base_layer.groups)

    def _exact_output_factor(self) -> Float[Tensor, "out rank"]:
        """B for the effective weight.

        Raises:
            ValueError: A reads the channels of all groups.
        """
        if reads_all_channels(self.base_layer, self.lora_A):
            raise ValueError(
                f"a convolution with groups={self.base_layer.groups} cannot hold this adapter, "
                "whose lora_A PEFT has trained for the channels of all groups. Keep the adapter "
                "unmerged"
            )
        return super()._exact_output_factor()

    def _low_rank(
        self,
        x: Float[Tensor, "*batch_channels_positions"],
        lora_A: Float[Tensor, "rank in"],
        lora_B: Float[Tensor, "out rank"],
    ) -> Tensor:
        dtype, base = common_dtype(x, lora_A), self.base_layer
        x, lora_A = x.to(lora_A.device, dtype), lora_A.to(dtype)
        if reads_all_channels(base, lora_A):
            hidden = convolve_all_channels(base, x, lora_A) * self.scaling
        else:
            hidden = convolve(base, x, kernels(base, lora_A)) * self.scaling
        return pointwise(base, hidden, matrix_blocks(lora_B.to(dtype), base.groups).contiguous())

    def _base_without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        base = self.base_layer
        bias = None if base.bias is None else self._along_outputs(base.bias)
        if type(base).forward is torch_class(base).forward and not is_hooked(base):
            return convolve(base, x, base.weight), bias
        result = base(x)
        return (result if bias is None else result - bias), bias

    def _along_outputs(self, vector: Float[Tensor, " out"]) -> Float[Tensor, "out ..."]:
        return vector.view(-1, *[1] * (self.base_layer.weight.ndim - 2))


def reads_all_channels(module: Any, lora_A: Float[Tensor, "rank in"]) -> bool:
    """Whether A has kernels over the channels of all groups, not of one."""
    return module.groups > 1 and lora_A.shape[1] == module.in_channels * math.prod(
        module.kernel_size
    )
