"""Factors -> PEFT's own layers, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_init import linalg
from lora_init.base_weights import BaseWeights
from lora_init.config import LoraConfig
from lora_init.factors import Factors, low_rank_product
from lora_init.fingerprint import checksum, fingerprint
from lora_init.injection.changes import (
    Change,
    EditWeight,
    Lost,
    SetAttribute,
    SetData,
    SetFlag,
    SetItem,
    StoreWeight,
    take_back,
)
from lora_init.injection.settling import LARGEST_EDIT_GROWTH
from lora_init.injection.weights import store_weight
from lora_init.modules import oriented_weight, widened
from lora_init.plan import Plan, Target
from lora_init.under_peft.layers import START, AdaptedLayer, check_peft_model
from lora_init.under_peft.start import AddBackWhenDisabled, Start, records


def restore_peft_model(peft_model: nn.Module, adapter_name: str = "default") -> None:
    """Take an initialization back: the original base, and the adapter as PEFT had made it.

    What was trained since is given up; save it first. Ranks, layers and PEFT's configuration become
    what they were, too. Float32 weights come back within 1e-6 of their largest entry, 16-bit and
    quantised ones to the bit (with ``keep_original=False``: 16-bit ones up to rounding).

    Raises:
        TypeError: no PEFT model.
        ValueError: the adapter was not initialized by `initialize_peft_model`.
        RuntimeError: the base was replaced or quantised anew, and the original not kept.
    """
    check_peft_model(peft_model, adapter_name)
    if adapter_name not in records(peft_model):
        raise ValueError(
            f"adapter {adapter_name!r} was not initialized by initialize_peft_model, or was "
            "restored already"
        )
    take_off(peft_model, adapter_name)


def take_off(peft_model: nn.Module, adapter_name: str) -> list[Change]:
    """Take an initialization back, if there is one; returns what makes it again."""
    record = records(peft_model).get(adapter_name)
    return [] if record is None else take_back(record.changes)


@torch.no_grad()
def apply(
    layers: Mapping[str, AdaptedLayer],
    plan: Plan,
    factors: Mapping[str, Factors],
    weights: BaseWeights,
    done: list[Change],
    *,
    initial_known: bool = True,
) -> dict[str, float]:
    """Write factors into PEFT's parameters and settle the base; the model is the plain base now.

    Args:
        layers: by name; those that the plan has no target for are left as they are.
        done: gets the inverse of every change, as it is made.
        initial_known: the factors are those of step 0, not trained ones of a kept base.

    Returns:
        ‖W - (base + s B0 A0)‖ / ‖W‖ at step 0 of layers whose base was edited or quantised anew.
    """
    changes_base, errors = plan.initializer.base != "keep", {}
    for target in plan.targets:
        layer, made = layers[target.name], factors[target.name]
        _set_rank(layer, target, done)
        for which in ("lora_A", "lora_B"):
            stored = layer.stored(target, which, getattr(made, which)).clone()
            done.append(SetData(layer.factor(which), stored)())
        if layer.bias is not None:
            done.append(SetData(layer.bias, torch.zeros_like(layer.bias))())
        if initial_known:
            start = Start(
                made.lora_A.clone(),
                made.lora_B.clone(),
                scaling=target.scaling,
                fingerprint=fingerprint(oriented_weight(layer.base)) if changes_base else "",
                subtracts=plan.initializer.base == "subtract",
            )
            _remember(layer, start, done)
            error = _settle_base(layer, start, target, plan, made, weights, done)
            if error is not None:
                errors[target.name] = error
            _freeze(layer, plan, done)
        if layer.magnitude is not None:
            _set_magnitude(layer, target, done)
    return errors


def drop_layer(layer: AdaptedLayer, done: list[Change]) -> None:
    """Take the adapter off a layer that was allocated rank 0: the plain module is back."""
    for place in layer.places:
        done.append(SetAttribute(place.parent, place.attribute, layer.base)())


def set_config(peft_config: Any, config: LoraConfig, plan: Plan, done: list[Change]) -> None:
    """Let PEFT's configuration name the targets, ranks and alphas of an allocation."""
    explicit = plan.explicit(config)
    target_modules = explicit.target_modules
    values = {
        "target_modules": target_modules if isinstance(target_modules, str)
        else set(target_modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": explicit.rank_pattern,
        "alpha_pattern": explicit.alpha_pattern,
    }  # fmt: skip
    for name, value in values.items():
        done.append(SetAttribute(peft_config, name, value)())


def _set_rank(layer: AdaptedLayer, target: Target, done: list[Change]) -> None:
    """PEFT's figures of a layer, and the shapes its modules state."""
    module, adapter = layer.module, layer.adapter
    if (layer.rank, layer.alpha) == (target.rank, target.alpha):
        return
    for name, value in (
        ("r", target.rank),
        ("lora_alpha", target.alpha),
        ("scaling", target.scaling),
    ):
        done.append(SetItem(getattr(module, name), adapter, value)())
    if layer.is_embedding:
        return
    convolution = target.module_type == "Conv2d"
    for which, side in (("lora_A", "out"), ("lora_B", "in")):
        attribute = f"{side}_channels" if convolution else f"{side}_features"
        inner = getattr(module, which)[adapter]
        done.append(SetAttribute(inner, attribute, target.rank)())


def _remember(layer: AdaptedLayer, start: Start, done: list[Change]) -> None:
    if not hasattr(layer.module, START):
        done.append(SetAttribute(layer.module, START, nn.ModuleDict())())
    done.append(SetItem(getattr(layer.module, START), layer.adapter, start)())


def _settle_base(
    layer: AdaptedLayer,
    start: Start,
    target: Target,
    plan: Plan,
    factors: Factors,
    weights: BaseWeights,
    done: list[Change],
) -> float | None:
    """Edit or replace the base weight where the method does so."""
    if plan.initializer.base == "keep":
        return None
    base, replacement = layer.base, factors.replacement
    weight = weights.weight(target)
    if replacement is not None:
        make = replacement.residual if target.quantized else replacement.base
        lost = Lost(
            f"the base weight of {target.name!r} was replaced by a quantised one and no copy of it "
            "was kept; initialize with keep_original=True, or reload the base model"
        )
        done.append(StoreWeight(base, make(weight, target.scaling), lost)())
        start.base, start.replacement = "replaced", replacement
        start.checksum = checksum(oriented_weight(base))
        if target.quantized and weights.originals is not None:
            start.from_original_weights = fingerprint(weight)
    else:
        residual = widened(weight) - low_rank_product(start.lora_A, start.lora_B, start.scaling)
        back = EditWeight(base, start, 1)
        if _comes_back(weight, residual):
            store_weight(base, residual)
            done.append(back)
        else:
            done.append(StoreWeight(base, residual, back)())
        start.base = "edited"
    if not start.subtracts:
        return None
    done.append(AddBackWhenDisabled(layer.module)())
    present = oriented_weight(base) + low_rank_product(start.lora_A, start.lora_B, start.scaling)
    norm = linalg.frobenius_norm(widened(weight))
    return float(linalg.frobenius_norm(weight - present) / norm) if norm > 0 else 0.0


def _comes_back(weight: Tensor, residual: Tensor) -> bool:
    """Whether adding s B0 A0 again gives the weight within 1e-6 of its largest entry."""
    if weight.dtype not in (torch.float32, torch.float64):
        return False
    return bool(residual.abs().max() <= LARGEST_EDIT_GROWTH * weight.abs().max())


def _freeze(layer: AdaptedLayer, plan: Plan, done: list[Change]) -> None:
    """Take the factors that the method does not train out of training, for PEFT to know as well."""
    for which in plan.initializer.frozen:
        names = dict(getattr(layer.module, "frozen_peft_weight_names", {}))
        names[layer.adapter] = (*names.get(layer.adapter, ()), layer.container(which))
        done.append(SetAttribute(layer.module, "frozen_peft_weight_names", names)())
        done.append(SetFlag(layer.factor(which), False)())


def _set_magnitude(layer: AdaptedLayer, target: Target, done: list[Change]) -> None:
    """DoRA's m = ‖W_base + s B A‖ row by row, of the base as it is now."""
    product = low_rank_product(layer.matrix("lora_A"), layer.matrix("lora_B"), target.scaling)
    norms = torch.linalg.vector_norm(widened(oriented_weight(layer.base)) + product, dim=1)
    done.append(SetData(layer.magnitude, norms.view(layer.magnitude.shape))())
