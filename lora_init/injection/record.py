"""What was done to a model, and whether the adapter is on, off or merged at the moment."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from lora_init.factors import Replacement, widened
from lora_init.injection.weights import Held
from lora_init.layers import LoraLayer, TrainedModule
from lora_init.plan.plan import Target
from lora_init.weights import bitsandbytes
from lora_init.weights.source import BaseWeights


@dataclass
class Injection:
    """What was done to a model, enough to undo it.

    Attributes:
        weights: where weights that are not in memory are read from.
        layers: the adapted layers by name.
        trained: the whole-trained modules by name.
        biases: each trained bias and the data it does not have now: its original while the adapter
            is on, its trained value while it is off.
        originals: what each replaced base was, where it was kept.
        shared: layers whose weight another module reads too.
        inexact: layers whose forward rounds inputs or weights.
        fingerprints: of each target's original weight.
        replacements: how to rebuild each replaced base.
        checksums: of each replaced base.
        from_original_weights: of each layer whose replaced base came from an unquantised
            checkpoint, the fingerprint of the weight there.
        requires_grad: every parameter's flag before injection.
        enabled: whether the adapter is on.
        unmerged: what the base weights (and biases) were before the adapter was merged into them.
        untied: the shared parameter of each layer that got one of its own when it was merged.
        plain: packed modules as they were before they were kept plain.
        embedding_rows: whether the base's embeddings came from an adapter's file, which a new file
            must hold too.
    """

    weights: BaseWeights
    layers: dict[str, LoraLayer] = field(default_factory=dict)
    trained: dict[str, TrainedModule] = field(default_factory=dict)
    biases: dict[str, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)
    originals: dict[str, Held] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    inexact: frozenset[str] = frozenset()
    fingerprints: dict[str, str] = field(default_factory=dict)
    replacements: dict[str, Replacement] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    from_original_weights: dict[str, str] = field(default_factory=dict)
    requires_grad: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    enabled: bool = True
    unmerged: dict[str, tuple[Held, Tensor | None]] = field(default_factory=dict)
    untied: dict[str, nn.Parameter] = field(default_factory=dict)
    plain: dict[nn.Module, bitsandbytes.Held] = field(default_factory=dict)
    embedding_rows: bool = False

    @property
    def merged(self) -> bool:
        return bool(self.unmerged)

    def half_merged(self) -> str | None:
        """The first layer that a `merge_and_unload` merged before it failed."""
        if self.merged:
            return None
        return next((name for name, layer in self.layers.items() if layer.merged), None)

    def original_weight(self, target: Target) -> Float[Tensor, "out in"]:
        """The weight of a layer before injection, in float32 or wider, from where it is.

        Raises:
            RuntimeError: the base was replaced: nobody has it any more.
        """
        layer = self.layers[target.name]
        if layer.base_layer.weight.is_meta:
            return widened(self.weights.present(target))
        return layer.original_weight()

    def lost(self) -> list[str]:
        """Layers whose original weight nobody has any more."""
        return [
            name
            for name, layer in self.layers.items()
            if layer.base_state == "replaced" and name not in self.originals
        ]

    def refuse_lost(self, wanted: str) -> None:
        """Refuse what needs the original base where it is gone.

        Raises:
            RuntimeError: a base was replaced and its original not kept.
        """
        for name in self.lost():
            raise RuntimeError(
                f"{wanted}: the base weight of {name!r} was replaced by a quantised one and no "
                "copy of it was kept, so the original function is gone; initialize with "
                "get_peft_model(..., keep_original=True), or reload the base model"
            )
