"""Where each target's weight is read from: the model itself, or its unquantised checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.modules import oriented_weight
from lora_init.original_weights import OriginalWeights
from lora_init.plan import Target

# bitsandbytes' coarsest, FP4, is 0.2 from a real weight; another checkpoint's is about 1.4 away.
LARGEST_QUANTIZATION_ERROR = 0.7


class BaseWeights:
    """The targets' weights as ``(out, in)``, one at a time.

    Args:
        model: the base model.
        original_weights: where the weights from before quantisation are (see `OriginalWeights`).
            Read for quantised targets only: float ones hold theirs.
    """

    def __init__(
        self, model: nn.Module, original_weights: str | PathLike | Mapping[str, Tensor] | None
    ) -> None:
        self.model = model
        self.originals = None if original_weights is None else OriginalWeights(original_weights)

    def check(self, targets: tuple[Target, ...]) -> None:
        """Refuse a checkpoint that is not these targets'; reads no weight.

        Raises:
            ValueError: no target is quantised, or a weight is missing or has another shape.
        """
        if self.originals is None:
            return
        quantized = [target for target in targets if target.quantized]
        if not quantized:
            raise ValueError(
                "original_weights is given, but no target is quantised: their weights are the "
                "original ones; leave it out"
            )
        found: dict[str, str] = {}
        for target in quantized:
            shape = self.originals.shape(target.name)
            if self._stored_transposed(target):
                shape = shape[::-1]
            if shape != target.shape:
                raise ValueError(
                    f"original_weights: the weight of {target.name!r} is {shape} there and "
                    f"{target.shape} in the model; pass the checkpoint that the model was "
                    "quantised from"
                )
            key = self.originals.key(target.name)
            if key in found and not target.shared_with:
                raise ValueError(
                    f"original_weights: {found[key]!r} and {target.name!r} both find {key!r}; pass "
                    "the checkpoint that the model was quantised from"
                )
            found[key] = target.name

    def is_original(self, target: Target) -> bool:
        """Whether `weight` is the one from before any quantisation."""
        return not target.quantized or self.originals is not None

    def weight(self, target: Target) -> Float[Tensor, "out in"]:
        """On the module's device; float modules' in their own dtype, a view.

        Raises:
            ValueError: the checkpoint's weight is not the one that was quantised.
        """
        module = self.model.get_submodule(target.name)
        weight = oriented_weight(module)
        if not target.quantized or self.originals is None:
            return weight
        original = self.originals.weight(target.name)
        if self._stored_transposed(target):
            original = original.T
        original = original.to(weight.device, torch.float32)
        norm = torch.linalg.matrix_norm(original)
        error = torch.linalg.matrix_norm(weight - original) / norm
        if norm > 0 and error > LARGEST_QUANTIZATION_ERROR:
            raise ValueError(
                f"original_weights: the weight of {target.name!r} differs from the model's by "
                f"{float(error):.2f} of its norm, more than quantisation does; pass the checkpoint "
                "that the model was quantised from"
            )
        return original

    def _stored_transposed(self, target: Target) -> bool:
        """Whether the checkpoint has (in, out): transformers quantises Conv1D as a linear layer."""
        source = getattr(self.model.get_submodule(target.name), "source_cls", None)
        return source is not None and source.__name__ == "Conv1D"
