"""The original base of a trained model, also if the method changed its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from lora_init import LoraModel
from lora_init.plan.plan import Target
from lora_init.weights.source import BaseWeights


class OriginalModel:
    """The model with its adapter off or, if its weights were replaced, loaded again.

    A copy kept from the start would count in the recorded peak memory of the initialization.

    Args:
        model: the adapted model.
        load: loads the base again; returns it and the folder of its unquantized weights, if any.
    """

    def __init__(self, model: LoraModel, load: Callable[[], tuple[nn.Module, str | None]]) -> None:
        self.adapted = model
        self.weights: BaseWeights | None = None
        if model.plan.replaced:
            self.weights = BaseWeights(*load())

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The model that computes the original function."""
        if self.weights is not None:
            yield self.weights.model
        else:
            with self.adapted.disable_adapter():
                yield self.adapted.get_base_model()

    def weight(self, target: Target) -> Float[Tensor, "out in"]:
        """A layer's original weight."""
        if self.weights is not None:
            return self.weights.weight(target)
        return self.adapted.layers[target.name].original_weight()
