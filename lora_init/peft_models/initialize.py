"""`initialize_peft_model`: plan, statistics, allocation and initialization of PEFT's own layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lora_init import linalg
from lora_init.adapters.second_adapter import second_weights
from lora_init.calibration.result import Calibration
from lora_init.factors import low_rank_product, mean_figures
from lora_init.initialize.run import InitializedLayer, fused_layers
from lora_init.initialize.steps import check_call, computed_layers, timed
from lora_init.injection import Transaction, atomically
from lora_init.linalg.matrix import widened
from lora_init.model.report import InitReport, LayerReport, weight_figures
from lora_init.model.verification import original_output, verify_adapted
from lora_init.peft_models.apply import apply, begin, drop_layer, set_config
from lora_init.peft_models.first_pass import check_first_pass
from lora_init.peft_models.guards import guard
from lora_init.peft_models.holder import (
    base_model,
    checked_holder,
    disabled,
    is_peft_model,
    plain_base,
    refuse_merged,
    refuse_sharded,
    through_root,
)
from lora_init.peft_models.injected import own_peft_config
from lora_init.peft_models.layers import adapted_layers, refuse_sharded_layers
from lora_init.peft_models.load import load_adapter
from lora_init.peft_models.plan import (
    make_peft_plan,
    method_setting,
    own_config,
    refuse_foreign_start,
    refuse_trained,
)
from lora_init.peft_models.start import record
from lora_init.plan.plan import Plan
from lora_init.weights.source import BaseWeights

FIGURES = ("relative_norm", "norm_A", "norm_B", "captured_energy", "error")
"""The figures of a `LayerReport` that are computed from the weight and the factors."""


def initialize_peft_model(
    peft_model: nn.Module,
    method: Any,
    *,
    options: Any = None,
    calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | Calibration | None = None,
    calibration_memory: int | None = None,
    adapter_name: str = "default",
    seed: int = 0,
    device: str | torch.device | None = None,
    original_weights: str | PathLike[str] | Mapping[str, Tensor] | None = None,
    quantized_base: str = "in_forward",
    target_weights: str | PathLike[str] | Mapping[str, Tensor] | None = None,
    keep_original: bool = True,
    cache: bool = True,
    verify: Any = None,
) -> InitReport:
    """Initialize the LoRA layers of a live PEFT model by any method of this package.

    Call it right after `peft.get_peft_model`, before the optimizer is built. An adapter that has
    gradients, or values other than those of its start, is refused; an optimizer itself cannot be
    seen. Parameters stay the same objects, also if eva changes their shapes. An optimizer that was
    built too early therefore trains the right ones if it has not stepped. A second call first
    restores the model.

    The factors are those of `lora_init.get_peft_model` on the same base with the same seed. The
    base is

    - kept: unchanged;
    - subtracted from: a float32 weight is edited. 16-bit, quantized and tied weights and fused
      experts are unchanged, and the forward pass subtracts s B0 A0, so step 0 is exact there too.
      So are weights that FSDP2 has sharded; all ranks must call the function then.
      `step_0_error` in the report's details is ‖W - (base + s B0 A0)‖ / ‖W‖;
    - replaced: by a quantized weight.

    Args:
        peft_model: what `peft.get_peft_model` returned, or a model with PEFT's layers: after
            `add_adapter` of transformers, diffusers or sentence-transformers, or
            `peft.inject_adapter_in_model`. With ``init_lora_weights=True`` (PEFT's own pissa,
            olora, … have changed the base). Unchanged if anything fails.
        method: as `LoraConfig.init_lora_weights`: a name, "pissa_niter_N", a mapping, an options
            object, True or False.
        options: the method's settings, a mapping or its options object, if `method` is a name.
        calibration, calibration_memory, device, original_weights, target_weights, quantized_base:
            as of `lora_init.get_peft_model`.
        adapter_name: which of PEFT's adapters; rank, alpha, scaling and targets are its own.
        seed: of the initialization. Every layer has its own stream, keyed by its name.
        cache: as of `lora_init.get_peft_model`.
        verify: one batch, run at the end. A model is refused if it calls an adapted module without
            its adapter, or if its output changes under a method that preserves it. Without a
            batch, the first forward pass warns of layers that it does not use.
        keep_original: keep a copy, in CPU memory, of weights that cannot be computed back (16-bit,
            replaced, quantized; or far smaller than s B0 A0). `restore_peft_model` and a second
            call use it. Without it, 16-bit weights come back up to rounding, and replaced ones
            are lost.

    Returns:
        The report, with a row per layer.

    Raises:
        ValueError, TypeError: as `lora_init.get_peft_model`. Also, by name: an adapter that is
            trained already; other adapters under a method that changes the base; a merged adapter;
            a model that FSDP1 or DeepSpeed ZeRO-3 has sharded, or of whose layers `fully_shard`
            has made no units;
            a base that another PEFT model has changed; a layer, variant or convolution of PEFT's
            that cannot express it. Nothing is changed.
        RuntimeError: a second call, if the original base was not kept.
    """
    peft_model = checked_holder(peft_model, adapter_name)
    refuse_merged(peft_model, "initialize_peft_model")
    refuse_sharded(peft_model, "initialize_peft_model")
    refuse_foreign_start(peft_model, adapter_name)
    refuse_sharded_layers(base_model(peft_model), adapted_layers(peft_model, adapter_name))
    refuse_trained(peft_model, adapted_layers(peft_model, adapter_name))
    return atomically(
        partial(
            _initialize, peft_model, adapter_name, method_setting(method, options), calibration,
            calibration_memory, seed, device, original_weights, target_weights,
            quantized_base, keep_original, cache, verify,
        )
    )  # fmt: skip


def _initialize(
    peft_model: Any,
    adapter_name: str,
    setting: Any,
    calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | Calibration | None,
    calibration_memory: int | None,
    seed: int,
    device: str | torch.device | None,
    original_weights: Any,
    target_weights: Any,
    quantized_base: str,
    keep_original: bool,
    use_cache: bool,
    verify: Any,
    transaction: Transaction,
) -> InitReport:
    """Everything after the checks of the model, timed step by step."""
    operation = begin(peft_model, adapter_name, transaction)
    layers = adapted_layers(peft_model, adapter_name)
    config = own_config(peft_model, layers, setting)
    plan = make_peft_plan(
        peft_model, layers, config, quantized_base, calibration_memory, transaction
    )
    spec = plan.initializer
    expected = None
    if verify is not None and spec.preserves_output and not plan.replaced:
        with disabled(peft_model):
            expected = original_output(peft_model, verify)
    by_name = {layer.name: layer for layer in layers}
    steps = ("calibration", "allocation", "initialize", "apply")
    seconds: dict[str, float] = dict.fromkeys(steps, 0.0)
    with plain_base(peft_model, transaction) as base:
        second = second_weights(base, target_weights, spec)
        weights = BaseWeights(base, original_weights, second)
        check_call(plan, weights, calibration, False)
        # First: a calibration pass would have bitsandbytes round the scales of packed weights.
        operation.keep_plain(base)
        with through_root(peft_model, base):
            plan, made, tokens = computed_layers(
                plan, config, weights, calibration, device, seed, use_cache, seconds
            )
        matrices = plan.in_matrices()
        with timed(seconds, "initialize"):
            singles = {layer.target.name: _row(weights, matrices, layer) for layer in made}
            made = fused_layers(plan, made)
            rows = [_joined(layer, singles) for layer in made]
        factors = {layer.target.name: layer.factors for layer in made}
        with timed(seconds, "apply"):
            errors = apply(by_name, plan, factors, weights, operation)
    for name in by_name.keys() - factors.keys():
        drop_layer(by_name[name], operation)
    if not is_peft_model(peft_model):
        own_peft_config(peft_model, adapter_name, operation)
    if spec.allocates:
        set_config(peft_model.peft_config[adapter_name], config, plan, operation)
    record(peft_model, adapter_name, config, plan, operation)
    for row in rows:
        start = by_name[row.name].start
        row.base = "kept" if start is None else start.base
        if row.name in errors:
            row.details["step_0_error"] = errors[row.name]
    guard(peft_model, layers, operation, load_adapter)
    adapted = [by_name[row.name] for row in rows if by_name[row.name].is_called]
    if verify is not None:
        verify_adapted(
            peft_model,
            {layer.name: layer.module for layer in adapted},
            {layer.name: layer.base for layer in adapted},
            verify,
            expected=expected,
            disabled=partial(disabled, peft_model),
        )
    else:
        check_first_pass(base_model(peft_model), adapted, operation)
    if not keep_original:
        operation.changes.drop_weights()
    return InitReport(
        method=spec.name,
        options=dataclasses.asdict(plan.options),
        base=spec.base,
        needs_calibration=plan.calibration is not None,
        seconds=seconds | {"total": sum(seconds.values())},
        calibration_tokens=tokens,
        layers=rows,
    )


def _joined(layer: InitializedLayer, singles: Mapping[str, LayerReport]) -> LayerReport:
    """The report of a target; for a fused parameter, the mean figures of its experts."""
    target = layer.target
    if target.experts is None:
        return singles[target.name]
    row = LayerReport.of(target, layer.seconds)
    experts = [singles[one.name] for one in target.single()]
    figures = [{name: getattr(one, name) for name in FIGURES} for one in experts]
    for name, value in mean_figures(figures).items():
        setattr(row, name, value)
    row.details |= mean_figures([one.details for one in experts])
    return row


def _row(weights: BaseWeights, plan: Plan, layer: InitializedLayer) -> LayerReport:
    """The report's figures of one layer, from its weight before the change."""
    target, factors = layer.target, layer.factors
    weight = weights.weight(target) if weights.is_readable(target) else None
    row = LayerReport.of(target, layer.seconds)
    parts = factors.lora_A, factors.lora_B
    figures = weight_figures(weight, *parts, target.scaling, target.groups)
    subtracts = plan.initializer.base == "subtract" and factors.replacement is None
    if subtracts and weight is not None:
        product = low_rank_product(factors.lora_A, factors.lora_B, target.scaling)
        norm = linalg.frobenius_norm(widened(weight))
        if norm > 0:
            figures["error"] = float(linalg.frobenius_norm(weight - product) / norm)
    for name, value in {**figures, **factors.metrics}.items():
        if hasattr(row, name):
            setattr(row, name, value)
        else:
            row.details[name] = value
    return row
