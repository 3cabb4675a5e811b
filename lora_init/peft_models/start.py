"""What an initialization leaves in a PEFT model: A0 and B0 in each layer, and a record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.config.lora_config import LoraConfig
from lora_init.factors import Replacement, low_rank_product
from lora_init.peft_models.changes import Changes, Item, Operation
from lora_init.plan.plan import Plan

RECORDS = "lora_init_records"
"""The attribute of a PEFT model that holds its `Record`s by adapter."""


class Start(nn.Module):
    """The initial factors of one PEFT layer, and what was done to its base.

    A module, so that it is moved and copied with the layer. Its buffers are not persistent. Their
    names do not begin with "lora_", which many programs look for.

    Attributes:
        initial_A, initial_B: A0 (rank, in) and B0 (out, rank), as they were subtracted.
        scaling: s.
        layer, adapter: PEFT's layer, in a tuple so that it is not a submodule, and the adapter.
        base: the base weight is unchanged ("kept"), reduced by s B0 A0 ("edited"), or a quantized
            one that `replacement` makes ("replaced"). With "in_forward" it is unchanged, and the
            forward pass subtracts s B0 A0.
        fingerprint: of the original weight.
        checksum: of a replaced weight.
        from_original_weights: the fingerprint of the unquantized weight, if the replaced one was
            computed from a checkpoint.
        output_dtype: of the base module's own output at its last call.
        given: the input of a base module with pre-hooks, while it runs.
    """

    initial_A: Tensor
    initial_B: Tensor

    def __init__(
        self,
        layer: nn.Module,
        adapter: str,
        initial_A: Float[Tensor, "rank in"],
        initial_B: Float[Tensor, "out rank"],
        *,
        scaling: float,
        fingerprint: str,
    ) -> None:
        super().__init__()
        self.register_buffer("initial_A", initial_A, persistent=False)
        self.register_buffer("initial_B", initial_B, persistent=False)
        self.layer: tuple[Any] = (layer,)
        self.adapter = adapter
        self.scaling = scaling
        self.fingerprint = fingerprint
        self.base: Literal["kept", "edited", "replaced", "in_forward"] = "kept"
        self.replacement: Replacement | None = None
        self.checksum: str | None = None
        self.from_original_weights: str | None = None
        self.output_dtype = torch.float32
        self.given: Tensor | None = None

    def is_subtracting(self) -> bool:
        """Whether the forward pass subtracts s B0 A0 at the moment."""
        (layer,) = self.layer
        return self.base == "in_forward" and not layer.disable_adapters and not layer.merged

    def weight(self, adapter: str | None = None) -> float:
        """The weight c of an adapter, the active one by default: its scaling over alpha / r.

        diffusers weights adapters by their scaling. On the original base, an adapter of weight c
        adds c s (B A - B0 A0), so c s B0 A0 is subtracted. c is usually 1, and 0 if the layer has
        no active adapter.

        Raises:
            ValueError: c is not 1, with several active adapters or with DoRA.
        """
        (layer,) = self.layer
        names = layer.active_adapters if adapter is None else [adapter]
        active = [name for name in names if name in layer.r]
        if not active:
            return 0.0
        weights = [_weight(layer, name) for name in active]
        if all(weight == 1 for weight in weights):
            return 1.0
        has_dora = any(name in layer.lora_magnitude_vector for name in active)
        if len(active) > 1 or has_dora:
            reason = "use_dora=True" if has_dora else f"several active adapters ({active})"
            raise ValueError(
                f"an adapter weight of {weights[0]:g} is not supported with {reason}: adapter "
                f"{self.adapter!r} has changed the base of this model. Set the weight to 1, or "
                "save the adapter and load it into the original base"
            )
        return weights[0]

    def factors(self, adapter: str | None = None) -> tuple[Tensor, Tensor]:
        """A0 and B0. If the forward pass subtracts them, they have an adapter's dtype.

        Trainers cast an adapter after its start, and only factors of one dtype cancel at step 0.

        Args:
            adapter: the active one by default.
        """
        if self.base != "in_forward":
            return self.initial_A, self.initial_B
        (layer,) = self.layer
        if adapter is None:
            active = (name for name in layer.active_adapters if name in layer.r)
            adapter = next(active, self.adapter)
        if adapter in layer.lora_embedding_A:
            dtype = layer.lora_embedding_A[adapter].dtype
        else:
            dtype = layer.lora_A[adapter].weight.dtype
        return self.initial_A.to(dtype), self.initial_B.to(dtype)

    def product(self) -> Float[Tensor, "out in"]:
        """s B0 A0 in float32 or wider."""
        return low_rank_product(*self.factors(), self.scaling)


def _weight(layer: Any, adapter: str) -> float:
    rank, uses_root = layer.r[adapter], getattr(layer, "use_rslora", {}).get(adapter, False)
    weight = layer.scaling[adapter] * (rank**0.5 if uses_root else rank)
    weight /= layer.lora_alpha[adapter]
    # Programs multiply the scaling for one pass, and divide it again.
    return 1.0 if abs(weight - 1) < 1e-9 else weight


@dataclass
class Record:
    """One adapter's initialization, and how to undo it.

    Attributes:
        config, plan: ours, made from PEFT's configuration and layers.
        changes: taken back, they restore the model.
    """

    config: LoraConfig
    plan: Plan
    changes: Changes

    @property
    def changed_base(self) -> bool:
        return self.plan.initializer.base != "keep"


def records(peft_model: nn.Module) -> dict[str, Record]:
    """The present initializations of a PEFT model by adapter."""
    return vars(peft_model).setdefault(RECORDS, {})


def base_owner(peft_model: nn.Module) -> str | None:
    """The adapter whose initialization has changed the base; there is at most one."""
    owners = (name for name, record in records(peft_model).items() if record.changed_base)
    return next(owners, None)


def record(
    peft_model: nn.Module, adapter: str, config: LoraConfig, plan: Plan, operation: Operation
) -> None:
    """Note the initialization that an operation has made."""
    made = Record(plan.explicit(config), plan, operation.changes)
    operation.set(Item(records(peft_model), adapter), made)
