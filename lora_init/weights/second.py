"""The second weight W1 of each target, for methods that start from a difference of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.weights.checkpoint import OriginalWeights, stored_name

if TYPE_CHECKING:
    from lora_init.plan.plan import Target
    from lora_init.weights.source import BaseWeights


class SecondWeights(ABC):
    """The second weight of each target, read one at a time."""

    @abstractmethod
    def check(self, weights: BaseWeights, targets: Sequence[Target]) -> None:
        """Raise ValueError if a target has no second weight, or one of another shape.

        Args:
            weights: the first weights.
            targets: the layers to initialize.
        """

    @abstractmethod
    def weight(self, weights: BaseWeights, target: Target) -> Float[Tensor, "out in"]:
        """W1 of a target, on the device of its first weight, in any float dtype."""


class SecondCheckpoint(SecondWeights):
    """The weights of a second checkpoint, such as a fine-tuned model.

    Args:
        source: as for `OriginalWeights`.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `OriginalWeights`.
    """

    def __init__(self, source: str | PathLike | Mapping[str, Tensor]) -> None:
        with _named_after_the_argument():
            self._stored = OriginalWeights(source)

    def check(self, weights: BaseWeights, targets: Sequence[Target]) -> None:
        found: dict[tuple[str, int | None], str] = {}
        with _named_after_the_argument():
            for target in targets:
                name = stored_name(self._stored, target)
                empty = torch.empty(self._stored.shape(name), device="meta")
                shape = tuple(weights.oriented(target, empty).shape)
                wanted = target.shape if target.experts is None else (target.experts, *target.shape)
                if shape != wanted:
                    raise ValueError(
                        f"target_weights: the weight of {target.name!r} is {shape} (out, in) there "
                        f"and {wanted} in the model; pass a checkpoint of the same model"
                    )
                key = self._stored.key(name)
                place = key, target.expert
                if place in found and not target.shared_with:
                    raise ValueError(
                        f"target_weights: {found[place]!r} and {target.name!r} both find {key!r}; "
                        "pass a checkpoint with the names of this model"
                    )
                found[place] = target.name

    def weight(self, weights: BaseWeights, target: Target) -> Float[Tensor, "out in"]:
        with _named_after_the_argument():
            stored = self._stored.weight(stored_name(self._stored, target), target.expert)
        return weights.oriented(target, stored).to(weights.present(target).device)


@contextmanager
def _named_after_the_argument() -> Iterator[None]:
    """Let errors of `OriginalWeights` name the argument of the second checkpoint."""
    try:
        yield
    except (FileNotFoundError, ValueError, TypeError) as error:
        message = str(error).replace("original_weights", "target_weights")
        message = message.replace("the checkpoint that the model was made from", "a checkpoint")
        raise type(error)(message) from error
