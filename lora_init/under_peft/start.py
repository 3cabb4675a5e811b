"""What an initialization leaves with a PEFT model: A0 and B0 in each layer, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_init.config import LoraConfig
from lora_init.factors import Replacement
from lora_init.injection.changes import Change
from lora_init.modules import embedding_scale
from lora_init.plan import Plan
from lora_init.under_peft.layers import START, AdaptedLayer

RECORDS = "lora_init_records"
"""The attribute of a PEFT model that holds its `Record`s by adapter."""


class Start(nn.Module):
    """The initial factors of one PEFT layer, and what became of its base.

    A module, so that it moves and is copied with the layer; its buffers are not persistent, so that
    no state dict knows of it.

    Attributes:
        lora_A, lora_B: A0 (rank, in) and B0 (out, rank), as they were subtracted.
        scaling: s.
        base: the base weight is the original one ("kept"), less s B0 A0 ("edited"), or a quantised
            one that `replacement` makes ("replaced").
        subtracts: s B0 A0 is missing from the base, edited or quantised.
        fingerprint: of the original weight.
        checksum: of a replaced weight.
        from_original_weights: of the unquantised weight, where the replaced one was computed from a
            checkpoint: its fingerprint.
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(
        self,
        lora_A: Float[Tensor, "rank in"],
        lora_B: Float[Tensor, "out rank"],
        *,
        scaling: float,
        fingerprint: str,
        subtracts: bool,
    ) -> None:
        super().__init__()
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer("lora_B", lora_B, persistent=False)
        self.scaling = scaling
        self.fingerprint = fingerprint
        self.subtracts = subtracts
        self.base: Literal["kept", "edited", "replaced"] = "kept"
        self.replacement: Replacement | None = None
        self.checksum: str | None = None
        self.from_original_weights: str | None = None


@dataclass
class Record:
    """One adapter's initialization: what was done, and how to take it back.

    Attributes:
        config, plan: ours, made from PEFT's configuration and layers.
        changes: their calls, from the last to the first, restore the model.
    """

    config: LoraConfig
    plan: Plan
    changes: list[Change]

    @property
    def changed_base(self) -> bool:
        return self.plan.initializer.base != "keep"


def records(peft_model: nn.Module) -> dict[str, Record]:
    """The initializations that are in force, by adapter."""
    return vars(peft_model).setdefault(RECORDS, {})


def base_owner(peft_model: nn.Module) -> str | None:
    """The adapter whose initialization has changed the base; there is one at most."""
    owners = [name for name, record in records(peft_model).items() if record.changed_base]
    return owners[0] if owners else None


@dataclass(frozen=True)
class AddBackWhenDisabled:
    """Let a layer compute its original output while adapters are disabled.

    PEFT's disabled layer is its base, which lacks s B0 A0.
    """

    layer: nn.Module

    def __call__(self) -> RemoveHook:
        self.layer.register_forward_hook(add_back_when_disabled, with_kwargs=True)
        return RemoveHook(self.layer)


@dataclass(frozen=True)
class RemoveHook:
    """The inverse of `AddBackWhenDisabled`."""

    layer: nn.Module

    def __call__(self) -> AddBackWhenDisabled:
        for key, hook in list(self.layer._forward_hooks.items()):
            if hook is add_back_when_disabled:
                del self.layer._forward_hooks[key]
                self.layer._forward_hooks_with_kwargs.pop(key, None)
        return AddBackWhenDisabled(self.layer)


def add_back_when_disabled(
    layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """A forward hook: base(x) + s B0 A0 x, if adapters are disabled."""
    if not layer.disable_adapters:
        return None
    x = args[0] if args else kwargs["x"]
    for adapter, start in getattr(layer, START).items():
        if start.subtracts:
            initial = _initial_output(AdaptedLayer("", layer, adapter, ()), start, x)
            output = (output + initial).to(output.dtype)
    return output


def _initial_output(layer: AdaptedLayer, start: Start, x: Tensor) -> Tensor:
    """s B0 A0 x, by PEFT's own modules with other weights: strides and all."""
    if layer.is_embedding:
        rows = functional.embedding(x, start.lora_A.T) @ start.lora_B.T * start.scaling
        scale = embedding_scale(layer.base)
        return rows if scale is None else rows * scale
    result = x
    for which in ("lora_A", "lora_B"):
        module, matrix = getattr(layer.module, which)[layer.adapter], getattr(start, which)
        weights = {"weight": matrix.view(module.weight.shape)}
        if module.bias is not None:
            weights["bias"] = torch.zeros_like(module.bias)
        result = torch.func.functional_call(module, weights, (result.to(matrix.dtype),))
    return result * start.scaling
