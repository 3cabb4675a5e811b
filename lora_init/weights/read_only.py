"""The base class of quantizers' formats whose packed weights are read, but never written.

The module's own forward computes the product. A subtracting method leaves the codes as they are and
subtracts s B0 A0 in the forward pass, so the output at step 0 is the base model's. Merging into
such a weight, and methods that replace it, are refused by name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Set
from typing import ClassVar

import torch
from torch import nn

from lora_init.weights.format import WEIGHT, Held, Matrix, WeightFormat, class_names, sizes
from lora_init.weights.offload import stored_weight
from lora_init.weights.sharded import read_whole


class ReadOnlyFormat(WeightFormat):
    """A linear layer of a quantizer. A subclass recognizes it, and dequantizes it in `values`.

    Attributes:
        classes: the names of the classes that `matches` recognizes; empty for `name` alone.
    """

    classes: ClassVar[Set[str]] = frozenset()
    subtractions = ("in_forward",)
    quantized = True
    writable = False

    def matches(self, module: nn.Module) -> bool:
        return not class_names(module).isdisjoint(self.classes or {self.name})

    def shape(self, module: nn.Module, name: str = WEIGHT) -> tuple[int, int]:
        return sizes(module)

    def unreadable(self, module: nn.Module, name: str = WEIGHT) -> str | None:
        if stored_weight(module).is_meta:
            return (
                "its quantized weight is on the meta device (offloaded, or not loaded); load the "
                "model into memory first"
            )
        return None

    @torch.no_grad()
    def read(self, module: nn.Module, name: str = WEIGHT) -> Matrix:
        """The dequantized weight, in float32 and on the module's device.

        Raises:
            TypeError: the values cannot be read; see `opaque`.
            ValueError: `values` returns another shape than `shape` states.
        """
        if (reason := self.opaque(module)) is not None:
            raise TypeError(
                f"the weight of a {type(module).__name__} ({self.describe(module)}) cannot be "
                f"read, because {reason}"
            )
        values = read_whole(self.values, module)
        if tuple(values.shape) != tuple(self.shape(module, name)):
            raise ValueError(
                f"{type(self).__name__}.values returned shape {tuple(values.shape)}: must be "
                f"(out, in) = {tuple(self.shape(module, name))}"
            )
        return values.to(torch.float32)

    @abstractmethod
    def values(self, module: nn.Module) -> Matrix:
        """The dequantized weight in any float dtype, at least as precise as the module's."""

    def write(
        self, module: nn.Module, weight: Matrix, name: str = WEIGHT, *, own: bool = False
    ) -> None:
        raise self._refusal(module)

    def hold(self, module: nn.Module, name: str = WEIGHT, *, on_cpu: bool = False) -> Held:
        raise self._refusal(module)

    def put_back(self, module: nn.Module, held: Held) -> None:
        raise self._refusal(module)

    def _refusal(self, module: nn.Module) -> TypeError:
        return TypeError(
            f"writing the weight of a {type(module).__name__} ({self.describe(module)}) is not "
            "supported: its codes are read-only. Use the unquantized model."
        )
