"""Writing factors into PEFT's own layers, and undoing it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_init import linalg
from lora_init.config.lora_config import LoraConfig
from lora_init.factors import Factors, low_rank_product, widened
from lora_init.injection.base import comes_back
from lora_init.peft_models.changes import (
    EditWeight,
    Journal,
    Lost,
    SetAttribute,
    SetData,
    SetFlag,
    SetItem,
    StoreWeight,
)
from lora_init.peft_models.layers import START, AdaptedLayer, check_peft_model, refuse_merged
from lora_init.peft_models.start import Start, records
from lora_init.peft_models.subtraction import AddHook, complete_output, subtraction
from lora_init.plan.plan import Plan, Target
from lora_init.weights.checksum import base_checksum
from lora_init.weights.fingerprint import fingerprint
from lora_init.weights.kinds import oriented_weight
from lora_init.weights.source import BaseWeights


def restore_peft_model(peft_model: nn.Module, adapter_name: str = "default") -> None:
    """Undo an initialization: the original base, and the adapter as PEFT had made it.

    What was trained since is lost; save it first. Ranks, layers and PEFT's configuration become
    what they were, too. Float32 weights come back within 1e-6 of their largest entry, 16-bit and
    quantized ones to the bit (replaced ones with ``keep_original=True`` only). If anything is
    raised, an interrupt included, the model stays initialized.

    Raises:
        TypeError: not a PEFT model.
        ValueError: the adapter was not initialized by `initialize_peft_model`, or an adapter is
            merged.
        RuntimeError: the base was replaced, and the original was not kept.
    """
    check_peft_model(peft_model, adapter_name)
    record = records(peft_model).get(adapter_name)
    if record is None:
        raise ValueError(
            f"adapter {adapter_name!r} was not initialized by initialize_peft_model, or was "
            "restored already"
        )
    refuse_merged(peft_model, "restore_peft_model")
    others = [name for name in peft_model.peft_config if name != adapter_name]
    if record.changed_base and others:
        warnings.warn(
            f"restore_peft_model: adapter {others[0]!r} was used on the base that "
            f"{adapter_name!r} had changed; on the original base it computes something else",
            stacklevel=2,
        )
    record.changes.take_back()


@torch.no_grad()
def apply(
    layers: Mapping[str, AdaptedLayer],
    plan: Plan,
    factors: Mapping[str, Factors],
    weights: BaseWeights,
    done: Journal,
    *,
    initial_known: bool = True,
) -> dict[str, float]:
    """Write factors into PEFT's parameters and change the base; the model is the plain base now.

    Args:
        layers: by name; those without a target in the plan are left as they are.
        done: gets every change before it is made.
        initial_known: the factors are those of step 0, not trained ones of a kept base.

    Returns:
        ‖W - (base + s B0 A0)‖ / ‖W‖ at step 0 of layers whose base was changed.
    """
    changes_base, errors = plan.initializer.base != "keep", {}
    for target in plan.targets:
        layer, made = layers[target.name], factors[target.name]
        _set_rank(layer, target, done)
        for which in ("lora_A", "lora_B"):
            stored = layer.stored(target, which, getattr(made, which)).clone()
            done.do(SetData(layer.factor(which), stored))
        if layer.bias is not None:
            done.do(SetData(layer.bias, torch.zeros_like(layer.bias)))
        if initial_known:
            start = Start(
                made.lora_A.clone(),
                made.lora_B.clone(),
                scaling=target.scaling,
                fingerprint=fingerprint(oriented_weight(layer.base)) if changes_base else "",
                subtracts=plan.initializer.base == "subtract",
            )
            start.belongs_to(layer.module, layer.adapter)
            _remember(layer, start, done)
            if changes_base:
                done.do(SetAttribute(layer.base, START, start))
                error = _change_base(layer, start, target, plan, made, weights, done)
                if error is not None:
                    errors[target.name] = error
            _freeze(layer, plan, done)
        if layer.magnitude is not None:
            _set_magnitude(layer, target, done)
    return errors


def drop_layer(layer: AdaptedLayer, done: Journal) -> None:
    """Take the adapter off a layer that was allocated rank 0: the plain module is back."""
    for place in layer.places:
        done.do(SetAttribute(place.parent, place.attribute, layer.base))


def set_config(peft_config: Any, config: LoraConfig, plan: Plan, done: Journal) -> None:
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
        done.do(SetAttribute(peft_config, name, value))


def _set_rank(layer: AdaptedLayer, target: Target, done: Journal) -> None:
    """PEFT's figures of a layer, and the shapes that its modules state."""
    module, adapter = layer.module, layer.adapter
    if (layer.rank, layer.alpha) == (target.rank, target.alpha):
        return
    for name, value in (
        ("r", target.rank),
        ("lora_alpha", target.alpha),
        ("scaling", target.scaling),
    ):
        done.do(SetItem(getattr(module, name), adapter, value))
    if layer.is_embedding:
        return
    convolution = target.module_type == "Conv2d"
    for which, side in (("lora_A", "out"), ("lora_B", "in")):
        attribute = f"{side}_channels" if convolution else f"{side}_features"
        inner = getattr(module, which)[adapter]
        done.do(SetAttribute(inner, attribute, target.rank))


def _remember(layer: AdaptedLayer, start: Start, done: Journal) -> None:
    if not hasattr(layer.module, START):
        done.do(SetAttribute(layer.module, START, nn.ModuleDict()))
    done.do(SetItem(getattr(layer.module, START), layer.adapter, start))


def subtracts_in_forward(layer: AdaptedLayer, target: Target, plan: Plan) -> bool:
    """Whether a subtracting method leaves this base weight alone, whatever its values are."""
    if plan.initializer.base != "subtract":
        return False
    if target.quantized:
        return not plan.requantizes
    if target.shared_with:
        return True
    # DoRA with dropout reads the base's weight, not its output.
    return not _drops_decomposed(layer) and layer.base.weight.dtype not in (
        torch.float32,
        torch.float64,
    )


def _drops_decomposed(layer: AdaptedLayer) -> bool:
    dropout = layer.module.lora_dropout
    drops = layer.adapter in dropout and isinstance(dropout[layer.adapter], nn.Dropout)
    return layer.magnitude is not None and drops and not layer.is_embedding


def check_subtraction(layer: AdaptedLayer, target: Target, plan: Plan) -> None:
    """Refuse a layer that can hold the difference neither in its weight nor in its forward pass.

    Raises:
        ValueError: DoRA with dropout on a quantized or tied weight.
    """
    if subtracts_in_forward(layer, target, plan) and _drops_decomposed(layer):
        fix = "or quantized_base='requantize'" if target.quantized else "or untie the weights"
        raise ValueError(
            f"lora_dropout={layer.module.lora_dropout[layer.adapter].p} with use_dora=True is not "
            f"supported for {target.name!r} by {plan.initializer.name}: PEFT reads the weight of "
            f"the base there, which {plan.initializer.name} cannot change. Use lora_dropout=0, "
            f"{fix}"
        )


def _change_base(
    layer: AdaptedLayer,
    start: Start,
    target: Target,
    plan: Plan,
    factors: Factors,
    weights: BaseWeights,
    done: Journal,
) -> float | None:
    """Edit or replace the base weight, or let the forward pass subtract."""
    base, replacement = layer.base, factors.replacement
    weight = weights.weight(target)
    if replacement is not None:
        make = replacement.residual if target.quantized else replacement.base
        lost = Lost(
            f"the base weight of {target.name!r} was replaced by a quantized one and no copy of it "
            "was kept; initialize with keep_original=True, or reload the base model"
        )
        start.base, start.replacement = "replaced", replacement
        done.do(StoreWeight(base, make(weight, target.scaling), lost))
        start.checksum = base_checksum(replacement, weight, target.scaling, oriented_weight(base))
        if target.quantized and weights.originals is not None:
            start.from_original_weights = fingerprint(weight)
    elif subtracts_in_forward(layer, target, plan) or not _holds_edit(layer, start, weight):
        start.base = "in_forward"
        for change in subtraction(layer):
            done.do(change)
    elif weight.dtype in (torch.float32, torch.float64):
        start.base = "edited"
        done.do(EditWeight(base, start))
    else:
        start.base = "edited"
        residual = widened(weight) - start.product()
        done.do(StoreWeight(base, residual, EditWeight(base, start, made=True)))
    if not start.subtracts:
        return None
    done.do(AddHook(layer.module, complete_output))
    if start.base == "in_forward":
        return 0.0
    present = oriented_weight(base) + start.product()
    norm = linalg.frobenius_norm(widened(weight))
    return float(linalg.frobenius_norm(weight - present) / norm) if norm > 0 else 0.0


def _holds_edit(layer: AdaptedLayer, start: Start, weight: Tensor) -> bool:
    """Whether the edited weight is worth more than a second product in the forward pass."""
    if weight.dtype not in (torch.float32, torch.float64) or _drops_decomposed(layer):
        return True
    return comes_back(weight, start.initial_A, start.initial_B, start.scaling)


def _freeze(layer: AdaptedLayer, plan: Plan, done: Journal) -> None:
    """Take the factors that the method does not train out of training, for PEFT to know as well."""
    for which in plan.initializer.frozen:
        names = dict(getattr(layer.module, "frozen_peft_weight_names", {}))
        names[layer.adapter] = (*names.get(layer.adapter, ()), layer.container(which))
        done.do(SetAttribute(layer.module, "frozen_peft_weight_names", names))
        done.do(SetFlag(layer.factor(which), False))


def _set_magnitude(layer: AdaptedLayer, target: Target, done: Journal) -> None:
    """DoRA's m = ‖V‖ row by row, V the adapted weight as it is now."""
    product = low_rank_product(layer.matrix("lora_A"), layer.matrix("lora_B"), target.scaling)
    if layer.start is not None and layer.start.base == "in_forward":
        product -= layer.start.product()
    norms = torch.linalg.vector_norm(widened(oriented_weight(layer.base)) + product, dim=1)
    done.do(SetData(layer.magnitude, norms.view(layer.magnitude.shape)))
