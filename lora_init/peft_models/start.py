"""What an initialization leaves in a PEFT model: A0 and B0 in each layer, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.config.lora_config import LoraConfig
from lora_init.factors import Replacement, low_rank_product
from lora_init.peft_models.changes import Journal
from lora_init.plan.plan import Plan

RECORDS = "lora_init_records"
"""The attribute of a PEFT model that holds its `Record`s by adapter."""


class Start(nn.Module):
    """The initial factors of one PEFT layer, and what was done to its base.

    A module, so that it is moved and copied with the layer. Its buffers are not persistent, and
    their names do not begin with "lora_", which many programs look for.

    Attributes:
        initial_A, initial_B: A0 (rank, in) and B0 (out, rank), as they were subtracted.
        scaling: s.
        base: the base weight is the original one ("kept"), less s B0 A0 ("edited"), or a
            quantized one that `replacement` makes ("replaced"). "in_forward": the original one,
            and the forward pass subtracts s B0 A0.
        subtracts: s B0 A0 is missing from the base's weight or output.
        fingerprint: of the original weight.
        checksum: of a replaced weight.
        from_original_weights: of the unquantized weight, where the replaced one was computed from a
            checkpoint: its fingerprint.
        output_dtype: of the base module's own output at its last call.
    """

    initial_A: Tensor
    initial_B: Tensor

    def __init__(
        self,
        initial_A: Float[Tensor, "rank in"],
        initial_B: Float[Tensor, "out rank"],
        *,
        scaling: float,
        fingerprint: str,
        subtracts: bool,
    ) -> None:
        super().__init__()
        self.register_buffer("initial_A", initial_A, persistent=False)
        self.register_buffer("initial_B", initial_B, persistent=False)
        self.scaling = scaling
        self.fingerprint = fingerprint
        self.subtracts = subtracts
        self.base: Literal["kept", "edited", "replaced", "in_forward"] = "kept"
        self.replacement: Replacement | None = None
        self.checksum: str | None = None
        self.from_original_weights: str | None = None
        self.output_dtype = torch.float32
        self.owner: tuple[nn.Module, str] | tuple[()] = ()

    def belongs_to(self, layer: nn.Module, adapter: str) -> None:
        """Name PEFT's layer and the adapter; in a tuple, so that the layer is no submodule."""
        self.owner = (layer, adapter)

    def is_subtracting(self) -> bool:
        """Whether the forward pass subtracts s B0 A0 at the moment."""
        layer, _ = self.owner
        return self.base == "in_forward" and not layer.disable_adapters and not layer.merged

    def factors(self, adapter: str | None = None) -> tuple[Tensor, Tensor]:
        """A0 and B0, where nothing was edited by them in an adapter's dtype.

        Trainers cast an adapter after its start, and only factors of one dtype cancel at step 0.

        Args:
            adapter: the active one by default.
        """
        if self.base != "in_forward":
            return self.initial_A, self.initial_B
        layer, owner = self.owner
        if adapter is None:
            adapter = next((name for name in layer.active_adapters if name in layer.r), owner)
        dtype = factor_of(layer, adapter).dtype
        return self.initial_A.to(dtype), self.initial_B.to(dtype)

    def product(self) -> Float[Tensor, "out in"]:
        """s B0 A0 in float32 or wider."""
        return low_rank_product(*self.factors(), self.scaling)


def factor_of(layer: nn.Module, adapter: str) -> Tensor:
    """The parameter of lora_A of one adapter in PEFT's layer."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter]
    return layer.lora_A[adapter].weight


@dataclass
class Record:
    """One adapter's initialization: what was done, and how to undo it.

    Attributes:
        config, plan: ours, made from PEFT's configuration and layers.
        changes: undone from the last to the first, they restore the model.
    """

    config: LoraConfig
    plan: Plan
    changes: Journal

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
