"""Writing factors into PEFT's own layers, and restoring the model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_init import linalg
from lora_init.config.lora_config import LoraConfig
from lora_init.factors import Factors, low_rank_product
from lora_init.injection import Transaction, atomically
from lora_init.injection.checksum import base_checksum
from lora_init.linalg.matrix import widened
from lora_init.peft_models.changes import Attribute, Data, Edit, Item, Operation, Trained
from lora_init.peft_models.holder import checked_holder, refuse_merged
from lora_init.peft_models.layers import AdaptedLayer, forget_removed
from lora_init.peft_models.start import Start, records
from lora_init.peft_models.subtraction import (
    EDITED_DTYPES,
    complete,
    holds_edit,
    subtract,
    subtracts_in_forward,
)
from lora_init.plan.plan import Plan, Target
from lora_init.weights.fingerprint import fingerprint
from lora_init.weights.kinds import FORMATS, oriented_weight
from lora_init.weights.source import BaseWeights


def restore_peft_model(peft_model: nn.Module, adapter_name: str = "default") -> None:
    """Undo an initialization: the original base, and the adapter as PEFT had made it.

    `peft_model` is what `initialize_peft_model` was given.

    What was trained since is lost, so save it first. Ranks, layers and PEFT's configuration are
    restored too. Float32 weights come back within 1e-6 of their largest entry, 16-bit and
    quantized ones exactly (replaced ones with ``keep_original=True`` only). If anything is raised,
    an interrupt included, the model stays initialized.

    Raises:
        TypeError: not a PEFT model.
        ValueError: the adapter was not initialized by `initialize_peft_model`, or an adapter is
            merged.
        RuntimeError: the base was replaced, and the original was not kept.
    """
    peft_model = checked_holder(peft_model, adapter_name)
    record = records(peft_model).get(adapter_name)
    if record is None:
        raise ValueError(
            f"adapter {adapter_name!r} was not initialized by initialize_peft_model, or was "
            "restored already"
        )
    refuse_merged(peft_model, "restore_peft_model")
    other = other_adapter(peft_model, adapter_name)
    if record.changed_base and other is not None:
        warnings.warn(
            f"restore_peft_model: adapter {other!r} was used on the base that {adapter_name!r} has "
            "changed; on the original base it computes something else",
            stacklevel=2,
        )
    atomically(record.changes.take_back)


def other_adapter(peft_model: Any, adapter_name: str) -> str | None:
    """The first adapter of the model with another name."""
    return next((name for name in peft_model.peft_config if name != adapter_name), None)


def begin(peft_model: nn.Module, adapter_name: str, transaction: Transaction) -> Operation:
    """Take back the present initialization of an adapter, before another one."""
    forget_removed(peft_model)
    record = records(peft_model).get(adapter_name)
    if record is not None:
        record.changes.take_back(transaction)
    return Operation(transaction)


@torch.no_grad()
def apply(
    layers: Mapping[str, AdaptedLayer],
    plan: Plan,
    factors: Mapping[str, Factors],
    weights: BaseWeights,
    operation: Operation,
    *,
    initial_known: bool = True,
) -> dict[str, float]:
    """Write factors into PEFT's parameters and change the base, while the model is the plain base.

    Args:
        layers: by name; those without a target in the plan are left as they are.
        initial_known: the factors are those of step 0, not trained ones of a kept base.

    Returns:
        ‖W - (base + s B0 A0)‖ / ‖W‖ at step 0 of the layers whose base was changed.
    """
    spec, errors = plan.initializer, {}
    for target in plan.targets:
        layer, made = layers[target.name], _in_peft(factors[target.name], target)
        _set_rank(layer, target, operation)
        for which in ("lora_A", "lora_B"):
            stored = layer.stored(which, getattr(made, which)).clone()
            operation.set(Data(layer.factor(which)), stored)
        if layer.bias is not None:
            operation.set(Data(layer.bias), torch.zeros_like(layer.bias))
        if initial_known:
            start = Start(
                layer.module,
                layer.adapter,
                made.lora_A.clone(),
                made.lora_B.clone(),
                scaling=target.scaling,
                fingerprint="" if spec.base == "keep" else _fingerprint(weights, layer, target),
            )
            operation.set(Attribute(layer.module, layer.mark), start, is_mark=True)
            if spec.base != "keep":
                operation.set(Attribute(layer.base, layer.base_mark), start, is_mark=True)
                absent = weights.is_sharded(target) or not weights.is_readable(target)
                weight = None if absent else weights.weight(target)
                _change_base(layer, start, target, plan, made, weights, operation)
                if spec.base == "subtract":
                    complete(layer, operation)
                    errors[target.name] = _error_at_start(layer, start, weight)
            _freeze(layer, plan, operation)
        if layer.magnitude is not None:
            operation.set(Data(layer.magnitude), _magnitude(layer, target, layer.magnitude))
    return errors


def _in_peft(factors: Factors, target: Target) -> Factors:
    """The factors with which PEFT's layer computes s B A.

    PEFT adds the product to the output projection of an attention twice, so B is halved there; see
    `lora_init.adapters.attention_keys`.
    """
    if target.attention is None or target.name.endswith("in_proj"):
        return factors
    return dataclasses.replace(factors, lora_B=factors.lora_B / 2)


def _fingerprint(weights: BaseWeights, layer: AdaptedLayer, target: Target) -> str:
    """The fingerprint of the original weight; empty if its values cannot be read."""
    if not weights.is_readable(target):
        return ""
    sharded = weights.is_sharded(target)
    return weights.fingerprint(target) if sharded else fingerprint(layer.base_weight)


def drop_layer(layer: AdaptedLayer, operation: Operation) -> None:
    """Remove the adapter from a layer that was allocated rank 0; the plain module remains.

    Raises:
        ValueError: a projection of an attention, which PEFT adapts as a whole.
    """
    if layer.attention is not None:
        raise ValueError(
            f"{layer.name!r} gets no rank, which is not supported in a PEFT model: PEFT adapts "
            "both projections of an attention or none. Leave it out (exclude_modules)"
        )
    for place in layer.places:
        operation.set(Attribute(place.parent, place.attribute), layer.base)


def set_config(peft_config: Any, config: LoraConfig, plan: Plan, operation: Operation) -> None:
    """Write the targets, ranks and alphas of an allocation into PEFT's configuration."""
    explicit = plan.explicit(config)
    targets = explicit.target_modules
    values = {
        "target_modules": targets if isinstance(targets, str) else set(targets or ()),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": explicit.rank_pattern,
        "alpha_pattern": explicit.alpha_pattern,
    }
    for name, value in values.items():
        operation.set(Attribute(peft_config, name), value)


def _set_rank(layer: AdaptedLayer, target: Target, operation: Operation) -> None:
    """Set the rank, alpha and scaling of a layer, and the shapes that its modules state."""
    if (layer.rank, layer.alpha) == (target.rank, target.alpha):
        return
    figures = {"r": target.rank, "lora_alpha": target.alpha, "scaling": target.scaling}
    for name, value in figures.items():
        operation.set(Item(getattr(layer.module, name), layer.adapter), value)
    if layer.is_embedding:
        return
    noun = "channels" if FORMATS[target.module_type].operation == "convolution" else "features"
    for which, side in (("lora_A", "out"), ("lora_B", "in")):
        inner = getattr(layer.module, which)[layer.adapter]
        operation.set(Attribute(inner, f"{side}_{noun}"), target.rank)


def _change_base(
    layer: AdaptedLayer,
    start: Start,
    target: Target,
    plan: Plan,
    factors: Factors,
    weights: BaseWeights,
    operation: Operation,
) -> None:
    """Edit or replace the base weight, or let the forward pass subtract."""
    base, replacement = layer.base, factors.replacement
    if replacement is None and subtracts_in_forward(layer, target, plan):
        start.base = "in_forward"
        subtract(layer, operation)
        return
    weight = weights.weight(target)
    if replacement is not None:
        make = replacement.residual if target.quantized else replacement.base
        start.base, start.replacement = "replaced", replacement
        operation.replace_weight(target.name, base, make(weight, target.scaling), None)
        start.checksum = base_checksum(replacement, weight, target.scaling, oriented_weight(base))
        if target.quantized and weights.originals is not None:
            start.from_original_weights = fingerprint(weight)
    elif not holds_edit(layer, start, weight):
        start.base = "in_forward"
        subtract(layer, operation)
    elif weight.dtype in EDITED_DTYPES:
        start.base = "edited"
        operation.edit(base, start)
    else:
        start.base = "edited"
        residual = widened(weight) - start.product()
        edit = Edit(base, start)
        operation.replace_weight(target.name, base, residual, edit)


def _error_at_start(layer: AdaptedLayer, start: Start, weight: Tensor | None) -> float:
    """‖W - (base + s B0 A0)‖ / ‖W‖."""
    if weight is None or start.base == "in_forward":
        return 0.0
    present = oriented_weight(layer.base) + start.product()
    norm = linalg.frobenius_norm(widened(weight))
    return float(linalg.frobenius_norm(weight - present) / norm) if norm > 0 else 0.0


def _freeze(layer: AdaptedLayer, plan: Plan, operation: Operation) -> None:
    """Freeze the factors that the method does not train, in a way that PEFT knows as well."""
    for which in plan.initializer.frozen:
        names = dict(getattr(layer.module, "frozen_peft_weight_names", {}))
        names[layer.adapter] = (*names.get(layer.adapter, ()), layer.container(which))
        operation.set(Attribute(layer.module, "frozen_peft_weight_names"), names)
        operation.set(Trained(layer.factor(which)), False)


def _magnitude(layer: AdaptedLayer, target: Target, like: Tensor) -> Tensor:
    """DoRA's m: the norms of the rows of the present adapted weight."""
    product = low_rank_product(layer.matrix("lora_A"), layer.matrix("lora_B"), target.scaling)
    if layer.start is not None and layer.start.base == "in_forward":
        product -= layer.start.product()
    norms = torch.linalg.vector_norm(widened(oriented_weight(layer.base)) + product, dim=1)
    return norms.view(like.shape)
