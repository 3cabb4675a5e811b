"""bitsandbytes' packed linear modules: how they store, dequantize and repack their weights.

| module | codes | scales | values |
|---|---|---|---|
| Linear4bit | two per byte | one per block, or 8-bit codes ("double") | table[code] · scale |
| Linear8bitLt | int8 | one per row | code · scale / 127 |

Values are float32 products of codes and scales, whatever the module's compute dtype. Only the
forward pass rounds them to the compute dtype.

Deviations:
    - `write` computes codes and scales in float32 with `Quantizer`, on every device. For
      Linear4bit they equal bitsandbytes' CPU results bit by bit (with double quantization: up to
      the rounding of a mean). Linear8bitLt's `.to` rounds the weight to float16 first; this code
      does not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_init.quantization.quantizer import Quantized, Quantizer
from lora_init.weights.format import WEIGHT, Matrix, WeightFormat, class_names, sizes
from lora_init.weights.offload import stored_weight
from lora_init.weights.sharded import read_whole, whole_shape


class PackedFormat(WeightFormat):
    """One of bitsandbytes' linear modules, recognized by its class name."""

    subtractions = "in_forward", "requantize"
    quantized = True

    def matches(self, module: nn.Module) -> bool:
        return self.name in class_names(module)

    def shape(self, module: nn.Module, name: str = WEIGHT) -> tuple[int, int]:
        return sizes(module)

    def unreadable(self, module: nn.Module, name: str = WEIGHT) -> str | None:
        if stored_weight(module).is_meta:
            return (
                "its quantized weight is on the meta device (offloaded, or not loaded); load the "
                "model into memory first, or build it without a quantization_config"
            )
        try:
            self.quantizer(module)
        except ValueError as error:
            return str(error)
        return None

    def read(self, module: nn.Module, name: str = WEIGHT) -> Matrix:
        """The dequantized weight, in float32 and on the module's device.

        Raises:
            ValueError: the weight is not quantized (yet).
        """
        return read_whole(self._values, module)

    def _values(self, module: nn.Module) -> Matrix:
        quantizer = self.quantizer(module)
        codes, scale = self.codes_and_scale(module)
        return quantizer.dequantize(Quantized(codes.reshape(self.shape(module)), scale, quantizer))

    @torch.no_grad()
    def write(
        self, module: nn.Module, weight: Matrix, name: str = WEIGHT, *, own: bool = False
    ) -> None:
        """Quantize a new weight with the module's settings and store it in a new parameter.

        Raises:
            ValueError: the present weight is not quantized (yet), or `weight` has another shape.
        """
        quantizer = self.quantizer(module)
        if tuple(weight.shape) != self.shape(module):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, but this {type(module).__name__} needs "
                f"{self.shape(module)}, (out, in)."
            )
        self.store(module, quantizer.quantize(weight.to(stored_weight(module).device)))

    def describe(self, module: nn.Module) -> str:
        """The quantizer's name: "nf4/64 double", "fp4/64", "int8"."""
        return self.quantizer(module).name.replace("+", " ")

    @abstractmethod
    def quantizer(self, module: nn.Module) -> Quantizer: ...

    @abstractmethod
    def codes_and_scale(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """The unpacked codes and their float32 scales."""

    @abstractmethod
    def store(self, module: nn.Module, quantized: Quantized) -> None:
        """Give the module a new parameter with these codes and scales."""


def bitsandbytes_parameter(name: str) -> Callable[..., nn.Parameter]:
    """A class of bitsandbytes' parameters, whose constructor has arguments that torch's has not."""
    from bitsandbytes import nn as modules

    return getattr(modules, name)


def parameter_count(parameter: Tensor) -> int:
    """The number of weights in a parameter. 4-bit storage holds two codes per byte."""
    if type(parameter).__name__ == "Params4bit":
        return 2 * parameter.element_size() * parameter.numel()
    return whole_shape(parameter).numel()


def unquantized(module: nn.Module, fix: str = "") -> ValueError:
    """The error for a packed module whose weight is still a float one."""
    fix = fix or 'move it to its device first, as in model.to("cpu")'
    return ValueError(f"This {type(module).__name__} holds no quantized weight; {fix}.")
