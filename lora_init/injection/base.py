"""Prepare a base weight for its adapter: keep, edit or replace it, or subtract in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_init.factors import Factors, Replacement, low_rank_product
from lora_init.injection.checksum import base_checksum
from lora_init.injection.editing import add_product
from lora_init.injection.record import Injection
from lora_init.injection.transaction import Transaction
from lora_init.layers import LoraLayer
from lora_init.linalg.matrix import widened
from lora_init.plan.plan import Plan, Target
from lora_init.weights.fingerprint import fingerprint
from lora_init.weights.kinds import known_format, oriented_weight
from lora_init.weights.sharded import is_sharded
from lora_init.weights.source import BaseWeights

# Adding an edit back to a float32 weight restores it within (growth + 1) 2^-24 max|W|. growth is
# max|edited W| / max|W|. A growth of 8 gives 5.4e-7, below the promised 1e-6.
LARGEST_EDIT_GROWTH = 8.0


def settle_base(
    layer: LoraLayer,
    target: Target,
    plan: Plan,
    factors: Factors,
    injection: Injection,
    weights: BaseWeights,
    keep_original: bool,
    transaction: Transaction,
) -> None:
    """Edit or replace the base weight, as the method requires.

    An edit needs the memory of one extra weight. A replaced weight stays in memory until the
    transaction ends, so that it can be restored.
    """
    module = layer.base_layer
    if plan.initializer.base == "keep":
        return
    if factors.replacement is not None:
        _replace(layer, target, factors.replacement, injection, weights, keep_original, transaction)
        return
    # Use the factors as stored, so that the rounded values of a 16-bit adapter are subtracted.
    # The parts of a sharded weight are not edited: whatever shards it may keep other copies.
    absent = layer.stored_weight.is_meta or is_sharded(layer.stored_weight)
    fixed = target.shared_with or target.quantized or absent or not target.exact
    editable = "edit" in known_format(module).subtractions
    if fixed or not editable or not _edit(layer, factors.lora_A, factors.lora_B, transaction):
        layer.base_state = "in_forward"


def _replace(
    layer: LoraLayer,
    target: Target,
    replacement: Replacement,
    injection: Injection,
    weights: BaseWeights,
    keep_original: bool,
    transaction: Transaction,
) -> None:
    """Replace the base weight by a quantized one.

    For a weight that is not loaded, only the replacement's recipe is recorded, as in a saved file.
    """
    module, one = layer.base_layer, known_format(layer.base_layer)
    shared, absent = bool(target.shared_with), layer.stored_weight.is_meta
    weight = weights.weight(target)
    # A packed module quantizes the residual itself. Values that are quantized already would have
    # their scales rounded twice.
    make = replacement.residual if target.quantized else replacement.base
    replaced = make(weight, target.scaling)
    if keep_original or shared or absent:
        on_cpu = not (shared or absent)
        injection.originals[target.name] = one.hold(module, layer.matrix, on_cpu=on_cpu)
    layer.base_state = "replaced"
    if not absent:
        transaction.weight(module, layer.matrix)
        one.write(module, replaced, layer.matrix, own=shared)
    injection.replacements[target.name] = replacement
    if target.quantized and weights.originals is not None:
        injection.from_original_weights[target.name] = fingerprint(weight)
    dtype = layer.stored_weight.dtype
    stored = replaced.to(dtype) if absent else one.read(module, layer.matrix)
    injection.checksums[target.name] = base_checksum(replacement, weight, target.scaling, stored)


def settle_magnitude(
    layer: LoraLayer, target: Target, injection: Injection, weights: BaseWeights
) -> None:
    """Initialize DoRA's magnitude to the row norms of the edited or replaced weight."""
    if layer.base_state == "replaced" and layer.base_layer.weight.is_meta:
        made = injection.replacements[target.name].base(weights.weight(target), target.scaling)
        present = made.to(layer.base_layer.weight.dtype)
    else:
        present = weights.present(target)
    layer.settle_norms(present)
    layer.lora_magnitude_vector.data = layer.adapted_norms(present)


def _edit(layer: LoraLayer, lora_A: Tensor, lora_B: Tensor, transaction: Transaction) -> bool:
    """Subtract s B0 A0 from a weight of 32 or more bits, if the edit can be undone.

    Returns:
        Whether the product was subtracted.
    """
    module = layer.base_layer
    if module.weight.dtype not in (torch.float32, torch.float64):
        return False
    if not comes_back(oriented_weight(module), lora_A, lora_B, layer.scaling):
        return False
    add_product(module, lora_A, lora_B, layer.scaling, -1, transaction)
    layer.base_state = "edited"
    return True


def comes_back(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> bool:
    """Whether W - s B A + s B A equals the float weight within 1e-6 of its largest entry."""
    largest = float(_largest(weight))
    # This bound on the entries of s B A usually suffices. It avoids computing W - s B A.
    rows = torch.linalg.vector_norm(widened(lora_B), dim=1).amax()
    columns = torch.linalg.vector_norm(widened(lora_A), dim=0).amax()
    if largest + scaling * float(rows * columns) <= LARGEST_EDIT_GROWTH * largest:
        return True
    residual = weight - low_rank_product(lora_A, lora_B, scaling).to(weight.device)
    return float(_largest(residual)) <= LARGEST_EDIT_GROWTH * largest


def move_initial_factors(
    layer: LoraLayer, lora_A: Tensor, lora_B: Tensor, transaction: Transaction
) -> None:
    """Replace a layer's initial factors and update its base state accordingly."""
    transaction.attributes(layer, "base_state", "initial_lora_A", "initial_lora_B")
    if layer.base_state == "edited":
        start = layer.initial_lora_A, layer.initial_lora_B
        add_product(layer.base_layer, *start, layer.scaling, 1, transaction)
        layer.base_state = "in_forward"
        _edit(layer, lora_A, lora_B, transaction)
    layer.initial_lora_A, layer.initial_lora_B = lora_A.clone(), lora_B.clone()
    if layer.use_dora:
        transaction.attributes(layer, "base_square_norms", "initial_projection")
        layer.settle_norms(oriented_weight(layer.base_layer))


def _largest(weight: Tensor) -> Tensor:
    low, high = torch.aminmax(weight)
    return torch.maximum(-low, high)
