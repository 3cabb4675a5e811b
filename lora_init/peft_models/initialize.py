"""`initialize_peft_model`: plan, statistics, allocation, initialization, on PEFT's own layers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lora_init import linalg
from lora_init.api import allocated, check_call, device_for
from lora_init.cache import Cache, default_cache
from lora_init.calibration.calibrate import calibrated
from lora_init.calibration.result import Calibration
from lora_init.config.lora_config import LoraConfig
from lora_init.factors import low_rank_product, widened
from lora_init.initialize.run import InitializedLayer, initialize
from lora_init.model.verification import original_output, verify_adapted
from lora_init.peft_models.apply import apply, drop_layer, set_config
from lora_init.peft_models.changes import Journal, SetItem, keep_plain
from lora_init.peft_models.first_pass import first_pass
from lora_init.peft_models.guards import guard
from lora_init.peft_models.layers import (
    AdaptedLayer,
    adapted_layers,
    check_peft_model,
    plain_base,
    refuse_merged,
)
from lora_init.peft_models.load import load_adapter
from lora_init.peft_models.operation import attempt
from lora_init.peft_models.plan import (
    method_setting,
    plan_for,
    refuse_started,
    refuse_strange_start,
    settings,
)
from lora_init.peft_models.start import Record, records
from lora_init.plan.plan import Plan
from lora_init.report import InitReport, LayerReport, weight_figures
from lora_init.weights.source import BaseWeights


def initialize_peft_model(
    peft_model: nn.Module,
    method: Any,
    *,
    options: Any = None,
    calibration: Iterable[Any] | Calibration | None = None,
    adapter_name: str = "default",
    seed: int = 0,
    device: str | torch.device | None = None,
    original_weights: str | PathLike | Mapping[str, Tensor] | None = None,
    quantized_base: str = "in_forward",
    keep_original: bool = True,
    cache: bool = True,
    verify: Any = None,
) -> InitReport:
    """Start the LoRA layers of a live PEFT model as `method` says.

    To be called right after `peft.get_peft_model`, before the optimizer is built. An adapter that
    has gradients, or values other than those of its start, is refused; an optimizer itself cannot
    be seen. Parameters stay the same objects, also where eva changes their shapes, so that one that
    was built too early still trains the right ones if it has not stepped. Called again, it first
    takes the former initialization back.

    The factors are those of `lora_init.get_peft_model` on the same base with the same seed. What
    becomes of the base:

    - kept: nothing;
    - subtracted: a float32 weight is edited. 16-bit, quantized and tied weights stay as they are,
      and the forward pass subtracts s B0 A0, so step 0 is exact there too. `step_0_error` in the
      report's details is ‖W - (base + s B0 A0)‖ / ‖W‖;
    - replaced: a quantized weight takes its place.

    Args:
        peft_model: what `peft.get_peft_model` returned, with ``init_lora_weights=True`` (PEFT's
            own pissa, olora, … have changed the base). Unchanged if anything fails.
        method: as `LoraConfig.init_lora_weights`: a name, "pissa_niter_N", a mapping, an options
            object, True or False.
        options: the method's settings, a mapping or its options object; goes with a name.
        calibration, device, original_weights, quantized_base: as of `lora_init.get_peft_model`.
        adapter_name: which of PEFT's adapters; rank, alpha, scaling and targets are its own.
        seed: of the initialization. Every layer has a stream of its own, keyed by its name.
        cache: as of `lora_init.get_peft_model`.
        verify: one batch, run at the end. A model that calls an adapted module around its adapter,
            or whose output changes under a method that preserves it, is refused. Without it, the
            first forward pass warns of layers that it does not use.
        keep_original: keep the original of weights that cannot be computed back (16-bit, replaced,
            quantised; or far smaller than s B0 A0), in CPU memory, for `restore_peft_model` and for
            another call. Without, 16-bit weights come back up to rounding, replaced ones not at
            all.

    Returns:
        The report, with a row per layer.

    Raises:
        ValueError, TypeError: as `lora_init.get_peft_model`; an adapter that is trained already;
            other adapters under a method that changes the base; a merged adapter; a base that
            another PEFT model has changed; a layer, variant or convolution of PEFT's that cannot
            express it. By name; nothing is changed.
        RuntimeError: called again where the original base was not kept.
    """
    check_peft_model(peft_model, adapter_name)
    refuse_merged(peft_model, "initialize_peft_model")
    refuse_strange_start(peft_model, adapter_name)
    layers = adapted_layers(peft_model, adapter_name)
    refuse_started(peft_model, layers)
    setting = method_setting(method, options)
    place = device_for(device)

    def start(done: Journal, wrappers: Journal) -> InitReport:
        layers = adapted_layers(peft_model, adapter_name)
        config = settings(peft_model, layers, setting)
        plan = plan_for(peft_model, layers, config, quantized_base, wrappers)
        expected = None
        if verify is not None and plan.initializer.preserves_output and not plan.replaced:
            with peft_model.disable_adapter():
                expected = original_output(peft_model, verify)
        report = _initialize(
            peft_model, layers, config, plan, calibration, original_weights, seed, place,
            default_cache() if cache else None, done, wrappers,
        )  # fmt: skip
        guard(peft_model, layers, done, load_adapter)
        adapted = adapted_layers(peft_model, adapter_name)
        if verify is not None:
            _verify(peft_model, adapted, verify, expected)
        else:
            for change in first_pass(peft_model.base_model.model, adapted):
                done.do(change)
        if not keep_original:
            records(peft_model)[adapter_name].changes = done.without_weights()
        return report

    return attempt(peft_model, adapter_name, start)


def _verify(
    peft_model: nn.Module, layers: list[AdaptedLayer], batch: Any, expected: Any
) -> None:
    """Refuse a model that does not use its adapted layers; see `initialize_peft_model`."""
    verify_adapted(
        peft_model,
        {layer.name: layer.module for layer in layers},
        {layer.name: layer.base for layer in layers},
        batch,
        expected=expected,
        disabled=peft_model.disable_adapter,
    )


def _initialize(
    peft_model: nn.Module,
    layers: list[AdaptedLayer],
    config: LoraConfig,
    plan: Plan,
    calibration: Iterable[Any] | Calibration | None,
    original_weights: Any,
    seed: int,
    device: torch.device | None,
    cache: Cache | None,
    done: Journal,
    wrappers: Journal,
) -> InitReport:
    """Everything after the checks that need no weights, timed step by step."""
    by_name = {layer.name: layer for layer in layers}
    seconds = {}
    with plain_base(peft_model, wrappers) as base:
        weights = BaseWeights(base, original_weights)
        check_call(plan, weights, calibration, False)
        # First: a calibration pass would have bitsandbytes round the scales of packed weights.
        for change in keep_plain(base):
            done.do(change)
        start = time.perf_counter()
        (statistics,) = calibrated(plan, base, calibration, device, cache)
        seconds["calibration"] = time.perf_counter() - start

        mark = time.perf_counter()
        if plan.initializer.allocates:
            plan = allocated(plan, config, statistics, weights)
        seconds["allocation"] = time.perf_counter() - mark

        mark = time.perf_counter()
        initialized = initialize(
            weights, plan, statistics.layers, seed=seed, device=device, cache=cache
        )
        rows = [_row(weights, plan, layer) for layer in initialized]
        seconds["initialize"] = time.perf_counter() - mark

        mark = time.perf_counter()
        factors = {layer.target.name: layer.factors for layer in initialized}
        errors = apply(by_name, plan, factors, weights, done)
    for name in by_name.keys() - factors.keys():
        drop_layer(by_name[name], done)
    if plan.initializer.allocates:
        set_config(peft_model.peft_config[layers[0].adapter], config, plan, done)
    record = Record(plan.explicit(config), plan, done)
    done.do(SetItem(records(peft_model), layers[0].adapter, record))
    seconds["apply"] = time.perf_counter() - mark
    seconds["total"] = sum(seconds.values())
    for row in rows:
        row.base = by_name[row.name].start.base
        if row.name in errors:
            row.details["step_0_error"] = errors[row.name]
    return InitReport(
        method=plan.initializer.name,
        options=dataclasses.asdict(plan.options),
        base=plan.initializer.base,
        needs_calibration=plan.calibration is not None,
        seconds=seconds,
        calibration_tokens=statistics.tokens,
        layers=rows,
    )


def _row(weights: BaseWeights, plan: Plan, layer: InitializedLayer) -> LayerReport:
    """The report's figures of one layer, from its weight as it was."""
    target, factors = layer.target, layer.factors
    weight = weights.weight(target)
    row = LayerReport.of(target, layer.seconds)
    figures = weight_figures(weight, factors.lora_A, factors.lora_B, target.scaling)
    if plan.initializer.base == "subtract" and factors.replacement is None:
        product = low_rank_product(factors.lora_A, factors.lora_B, target.scaling)
        norm = linalg.frobenius_norm(widened(weight))
        if norm > 0:
            figures["error"] = float(linalg.frobenius_norm(weight - product) / norm)
    names = {field.name for field in dataclasses.fields(LayerReport)}
    for name, value in {**figures, **factors.metrics}.items():
        if name in names:
            setattr(row, name, value)
        else:
            row.details[name] = value
    return row
