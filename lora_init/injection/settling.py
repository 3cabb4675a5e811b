"""What becomes of a base weight: kept, edited, replaced, or subtracted from in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_init.base_weights import BaseWeights
from lora_init.factors import Factors, low_rank_product
from lora_init.fingerprint import checksum, fingerprint
from lora_init.injection.state import Injection
from lora_init.injection.weights import hold, store_weight
from lora_init.layers import LoraLayer
from lora_init.modules import oriented_weight
from lora_init.plan import Plan, Target

# An edited float32 weight comes back within (growth + 1) 2^-24 max|W|, where growth is how much
# larger than W's its largest entry is: at most 5.4e-7 for 8, inside the promised 1e-6.
LARGEST_EDIT_GROWTH = 8.0


def settle_base(
    layer: LoraLayer,
    target: Target,
    plan: Plan,
    factors: Factors,
    injection: Injection,
    weights: BaseWeights,
    keep_original: bool,
) -> None:
    """Edit or replace the base weight where the method does so, one layer's memory at a time.

    The layer's `base_state` changes after an edit, which must not be undone if it was not done,
    and before a replacement, which must not pass for the original if it was.
    """
    module = layer.base_layer
    if plan.initializer.base == "keep":
        return
    if factors.replacement is not None:
        shared = bool(target.shared_with)
        weight, replacement = weights.weight(target), factors.replacement
        # A packed module quantises what it is given; values that are quantised already would have
        # their scales rounded twice.
        make = replacement.residual if target.quantized else replacement.base
        replaced = make(weight, target.scaling)
        if keep_original or shared:
            injection.originals[target.name] = hold(module, on_cpu=not shared)
        layer.base_state = "replaced"
        store_weight(module, replaced, own=shared)
        injection.replacements[target.name] = replacement
        if target.quantized and weights.originals is not None:
            injection.from_original_weights[target.name] = fingerprint(weight)
        injection.checksums[target.name] = checksum(oriented_weight(module))
        return
    # The factors as they are stored, so that a 16-bit adapter is subtracted as rounded.
    editable = not target.shared_with and not target.quantized
    if not editable or not _edit(layer, oriented_weight(module), factors.lora_A, factors.lora_B):
        layer.base_state = "in_forward"


def _edit(layer: LoraLayer, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Subtract s B0 A0 from a float32 weight, if that can be undone; whether it was done."""
    if weight.dtype not in (torch.float32, torch.float64):
        return False
    product = low_rank_product(lora_A, lora_B, layer.scaling)
    residual = torch.sub(weight, product, out=product)  # one layer's memory, not two
    if float(_largest(residual)) > LARGEST_EDIT_GROWTH * float(_largest(weight)):
        return False
    store_weight(layer.base_layer, residual)
    layer.base_state = "edited"
    return True


def move_initial_factors(layer: LoraLayer, lora_A: Tensor, lora_B: Tensor) -> None:
    """Give a layer the initial factors of another start, and its base what belongs to them."""
    state = layer.base_state
    if state == "edited":
        weight = layer.original_weight()
        layer.base_state = "in_forward"
        if not _edit(layer, weight, lora_A, lora_B):
            store_weight(layer.base_layer, weight)
    layer.initial_lora_A, layer.initial_lora_B = lora_A.clone(), lora_B.clone()
    layer.settle_norms()


def _largest(weight: Tensor) -> Tensor:
    low, high = torch.aminmax(weight)
    return torch.maximum(-low, high)
