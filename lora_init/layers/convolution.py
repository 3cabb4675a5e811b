"""Adapted two-dimensional convolutions."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_init.layers.base import LoraLayer, common_dtype
from lora_init.weights.offload import is_hooked


class ConvolutionLayer(LoraLayer):
    """``h = base(x) + s B (A * x)``: the rows of A are kernels of the base's size, B is 1 × 1.

    A has shape (rank, channels·height·width) here and (rank, channels, height, width) in files.
    """

    def _low_rank(
        self,
        x: Float[Tensor, "*batch channels height width"],
        lora_A: Float[Tensor, "rank in"],
        lora_B: Float[Tensor, "out rank"],
    ) -> Tensor:
        dtype = common_dtype(x, lora_A)
        kernels = lora_A.to(dtype).unflatten(1, self.base_layer.weight.shape[1:])
        # torch's method applies stride, dilation and all padding modes of the base.
        hidden = nn.Conv2d._conv_forward(self.base_layer, x.to(lora_A.device, dtype), kernels, None)
        hidden = hidden * self.scaling
        return functional.conv2d(hidden, lora_B.to(dtype)[:, :, None, None])

    def _base_without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        base = self.base_layer
        bias = None if base.bias is None else self._along_outputs(base.bias)
        if type(base).forward is nn.Conv2d.forward and not is_hooked(base):
            return base._conv_forward(x, base.weight, None), bias
        result = base(x)
        return (result if bias is None else result - bias), bias

    def _along_outputs(self, vector: Float[Tensor, " out"]) -> Float[Tensor, "out 1 1"]:
        return vector[:, None, None]
