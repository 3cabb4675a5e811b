"""Select the tensors to save: from a state dict that a trainer gathered, or from the model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lora_init.adapters.keys import plain_names, without_wrappers
from lora_init.weights.sharded import whole, whole_shape


class Given:
    """The tensors to save, from a state dict of the `LoraModel` or from the model.

    DeepSpeed, FSDP and Accelerate gather such a state dict from shards. Its keys may contain the
    parts that wrappers add.

    Args:
        state: the state dict; None for the tensors of the model.
        model: the base model, after injection.
    """

    def __init__(self, state: Mapping[str, Tensor] | None, model: nn.Module) -> None:
        self.names = plain_names(model)
        self.state: dict[str, Tensor] | None = None
        if state is not None:
            self.state = {
                without_wrappers(key).removeprefix("base_model."): value
                for key, value in state.items()
            }

    def part(self, layer: str, part: str, own: Tensor) -> Tensor:
        return self._value(f"{self.names[layer]}.{part}", own)

    def trained(self, module: str, key: str, own: Tensor) -> Tensor:
        return self._value(f"{self.names[module]}.trained_module.{key}", own)

    def bias(self, name: str, own: Tensor) -> Tensor:
        module, _, last = name.rpartition(".")
        plain = f"{self.names[module]}.{last}".removeprefix(".")
        inside = f"{self.names[module]}.base_layer.{last}"
        return self._value(inside if self.state and inside in self.state else plain, own)

    def _value(self, key: str, own: Tensor) -> Tensor:
        if self.state is None:
            return whole(own)
        found = self.state.get(without_wrappers(key))
        if found is None:
            raise ValueError(
                f"state_dict lacks 'base_model.{key}'. Pass the result of the LoraModel's "
                "state_dict(), or leave out state_dict."
            )
        if found.shape != whole_shape(own) and own.numel():
            raise ValueError(
                f"state_dict: 'base_model.{key}' has shape {tuple(found.shape)}, the model has "
                f"{tuple(whole_shape(own))}. Pass the state dict of this model, gathered from its "
                "shards."
            )
        return whole(found)
