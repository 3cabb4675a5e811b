"""The record of an injection: what changed in the model, and the adapter's present state."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from lora_init.factors import Replacement
from lora_init.layers import LoraExperts, LoraLayer, TrainedModule
from lora_init.layers.attention import SplitAttention
from lora_init.linalg.matrix import widened
from lora_init.plan.plan import Target
from lora_init.weights.format import Held
from lora_init.weights.source import BaseWeights


@dataclass
class Injection:
    """All that is needed to undo an injection.

    Attributes:
        weights: reads weights that are not in memory.
        layers: the adapted layers, by name.
        routed: the wrappers of experts modules, by the modules' names. They hold the layers of the
            modules' parameters.
        trained: the modules that are trained whole, by name.
        biases: each trained bias and its inactive values: the original values while the adapter is
            enabled, the trained values while it is disabled.
        originals: the original weight of each replaced base, where it was kept.
        shared: layers whose weight another module uses too.
        inexact: layers whose forward pass rounds inputs or weights, or has hooks.
        fingerprints: fingerprint of each target's original weight.
        replacements: how to rebuild each replaced base.
        checksums: checksum of each replaced base.
        from_original_weights: for each replaced base that comes from an unquantized checkpoint, the
            fingerprint of the checkpoint's weight.
        requires_grad: each parameter's flag before injection.
        enabled: whether the adapter is enabled.
        unmerged: base weights and biases before the merge; empty if not merged.
        untied: for each layer that merging untied, the parameter that it shared before.
        plain: packed modules as they were before `hold_plain`.
        embedding_rows: whether the base's embeddings were loaded from an adapter's file. A new file
            must then contain them.
        attentions: the split attention modules of an adapter that was taken out of the model.
    """

    weights: BaseWeights
    layers: dict[str, LoraLayer] = field(default_factory=dict)
    routed: dict[str, LoraExperts] = field(default_factory=dict)
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
    untied: dict[str, nn.Parameter | None] = field(default_factory=dict)
    plain: dict[nn.Module, Held] = field(default_factory=dict)
    embedding_rows: bool = False
    attentions: list[SplitAttention] = field(default_factory=list)

    @property
    def wrappers(self) -> list[LoraLayer | LoraExperts]:
        """The modules that replace base modules in the model."""
        held = {id(wrapper.base_layer) for wrapper in self.routed.values()}
        layers = [layer for layer in self.layers.values() if id(layer.base_layer) not in held]
        return [*layers, *self.routed.values()]

    @property
    def merged(self) -> bool:
        return bool(self.unmerged)

    def half_merged(self) -> str | None:
        """The first layer that a failed `merge_and_unload` left merged, or None."""
        if self.merged:
            return None
        return next((name for name, layer in self.layers.items() if layer.merged), None)

    def original_weight(self, target: Target) -> Float[Tensor, "*experts out in"]:
        """A layer's weight before injection, in float32 or wider.

        Raises:
            RuntimeError: the base was replaced and its original was not kept.
        """
        layer = self.layers[target.name]
        if layer.stored_weight.is_meta:
            return widened(self.weights.present(target))
        return layer.original_weight()

    def lost(self) -> list[str]:
        """Names of replaced layers whose original weight was not kept."""
        return [
            name
            for name, layer in self.layers.items()
            if layer.base_state == "replaced" and name not in self.originals
        ]

    def refuse_lost(self, wanted: str) -> None:
        """Raise if an original base weight is lost.

        Raises:
            RuntimeError: a base was replaced and its original was not kept.
        """
        for name in self.lost():
            raise RuntimeError(
                f"{wanted}: the base weight of {name!r} was replaced by a quantized one and no "
                "copy of it was kept, so the original function is gone; initialize with "
                "get_peft_model(..., keep_original=True), or reload the base model"
            )
