"""The modules that an injected model runs: an adapted layer and a module trained whole.

They compute; they never edit a base weight (`lora_init.injection` does).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_init.modules import is_transposed, oriented_weight

BaseState = Literal["kept", "edited", "in_forward", "replaced"]
"""Where the initial product s B0 A0 of a layer is accounted for:

- ``kept``: nowhere, the base weight is the original one;
- ``edited``: it was subtracted from the base weight (float32 and float64 bases);
- ``in_forward``: the base weight is the original one and the forward pass subtracts it (16-bit
  bases, whose rounding would eat the edit, and edits too large to be undone in float32);
- ``replaced``: the base weight is a quantised one.
"""


class LoraLayer(nn.Module):
    """``h = base(x) + s B A x`` around a linear module, with the way back to the original.

    Attributes:
        base_layer: the wrapped nn.Linear or Conv1D.
        lora_A, lora_B: trainable factors, (rank, in) and (out, rank).
        initial_lora_A, initial_lora_B: the factors at step 0; None for a kept base loaded from a
            file, which does not hold them.
        scaling: s.
        base_state: see `BaseState`.
        original_weight_copy: W in CPU memory, where a replacing method was asked to keep it.
    """

    initial_lora_A: Tensor | None
    initial_lora_B: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        lora_A: Float[Tensor, "rank in"],
        lora_B: Float[Tensor, "out rank"],
        *,
        scaling: float,
        dropout: float,
        base_state: BaseState,
        initial: tuple[Tensor, Tensor] | None,
        original_weight_copy: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        initial_A, initial_B = initial if initial is not None else (None, None)
        self.register_buffer("initial_lora_A", initial_A)
        self.register_buffer("initial_lora_B", initial_B)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.scaling = scaling
        self.base_state = base_state
        self.original_weight_copy = original_weight_copy
        self.adapter_enabled = True
        self.training = self.dropout.training = base_layer.training

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: models look at its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not self.adapter_enabled:
            return self._original_output(x)
        result = self.base_layer(x)
        delta = self._low_rank(self.dropout(x), self.lora_A, self.lora_B)
        if self.base_state == "in_forward":
            # Two products, not one of rank 2r: at step 0 they cancel to the last bit.
            delta = delta - self._low_rank(x, self.initial_lora_A, self.initial_lora_B)
        # Added before rounding: a 16-bit result plus a float32 delta is a float32 sum.
        return (result + delta).to(result.dtype)

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """What training changed, in float32 or wider: s (B A - B0 A0), or s B A on a kept base."""
        delta = low_rank_product(self.lora_A, self.lora_B, self.scaling)
        if self.base_state in ("edited", "in_forward"):
            delta -= self.initial_product()
        return delta

    def initial_product(self) -> Float[Tensor, "out in"]:
        """s B0 A0, always by the same operations, so that an edit and its undoing agree."""
        return low_rank_product(self.initial_lora_A, self.initial_lora_B, self.scaling)

    def original_weight(self) -> Float[Tensor, "out in"]:
        """The weight before injection, in float32 or wider.

        Raises:
            RuntimeError: if the base was replaced and no copy of it was kept.
        """
        if self.base_state == "replaced":
            return widened(self._kept_copy()).to(self.base_layer.weight.device)
        weight = widened(oriented_weight(self.base_layer))
        return weight + self.initial_product() if self.base_state == "edited" else weight

    def merged_weight(self) -> Float[Tensor, "out in"]:
        """The weight of a plain layer that computes what this one does now (dropout off)."""
        weight = widened(oriented_weight(self.base_layer))
        merged = weight + low_rank_product(self.lora_A, self.lora_B, self.scaling)
        return merged - self.initial_product() if self.base_state == "in_forward" else merged

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, base_state={self.base_state!r}"

    def _low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        # In the wider of the two dtypes: 16-bit factors on a float32 base must not round its
        # outputs. Scaled in the middle, where there are only `rank` numbers a token.
        dtype = torch.promote_types(x.dtype, lora_A.dtype)
        hidden = functional.linear(x.to(dtype), lora_A.to(dtype)) * self.scaling
        return functional.linear(hidden, lora_B.to(dtype))

    def _original_output(self, x: Tensor) -> Tensor:
        if self.base_state == "replaced":
            weight = self._kept_copy().to(x.device, self.base_layer.weight.dtype)
            return functional.linear(x, weight, self.bias)
        result = self.base_layer(x)
        if self.base_state != "edited":
            return result
        initial = self._low_rank(x, self.initial_lora_A, self.initial_lora_B)
        return (result + initial).to(result.dtype)

    def _kept_copy(self) -> Tensor:
        if self.original_weight_copy is None:
            raise RuntimeError(
                "the base weight was replaced by a quantised one and no copy of it was kept, so "
                "the original function is gone; initialize with keep_original=True (LoftQ's "
                "option), or reload the base model"
            )
        return self.original_weight_copy


class TrainedModule(nn.Module):
    """A module of `modules_to_save`: a trained copy beside the untouched original.

    Attributes of the module inside are reachable through this one.
    """

    def __init__(self, original_module: nn.Module, trained_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.trained_module = trained_module
        self.adapter_enabled = True
        self.training = original_module.training

    @property
    def active_module(self) -> nn.Module:
        return self.trained_module if self.adapter_enabled else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.active_module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "trained_module"):
                raise
            return getattr(self.active_module, name)


def widened(weight: Tensor) -> Tensor:
    """At least float32: 16-bit weights are never calculated with."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def low_rank_product(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Float[Tensor, "out in"]:
    """s B A in float32 or wider."""
    return (widened(lora_B.detach()) * scaling) @ widened(lora_A.detach())


def stored_orientation(module: nn.Module, weight: Float[Tensor, "out in"]) -> Tensor:
    """The inverse of `oriented_weight`: as the module stores it."""
    return weight.T if is_transposed(module) else weight
