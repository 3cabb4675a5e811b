"""The main functions: add an adapter to a model, and initialize it again."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn

from lora_init import injection
from lora_init.adapters.peft_selection import describe_differences, different_in_peft
from lora_init.adapters.second_adapter import second_weights
from lora_init.calibration.calibrate import calibrate
from lora_init.calibration.result import Calibration
from lora_init.calibration.sets import check_calibration
from lora_init.config.lora_config import LoraConfig
from lora_init.initialize.base_weight import apply_factors
from lora_init.initialize.run import InitializedLayer, fused_layers
from lora_init.initialize.single import init_factors
from lora_init.initialize.steps import check_call, computed_layers, timed
from lora_init.model.base_methods import uncover_methods
from lora_init.model.lora_model import LoraModel
from lora_init.model.report import InitReport, weight_figures
from lora_init.model.verification import original_output, verify_adapted
from lora_init.plan.attention import attention_targets, split_on_success
from lora_init.plan.make import check_model, checked_config, make_plan
from lora_init.plan.new_weights import with_new_heads
from lora_init.plan.plan import Plan
from lora_init.weights.sharded import reshard
from lora_init.weights.source import BaseWeights

__all__ = ["apply_factors", "calibrate", "get_peft_model", "init_factors", "reinitialize"]


class CallSettings(TypedDict, total=False):
    """The keywords of `get_peft_model` except `dry_run`, for the types of its overloads."""

    calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | Calibration | None
    calibration_memory: int | None
    adapter_dtype: torch.dtype
    device: str | torch.device | None
    seed: int
    quantized_base: str
    original_weights: str | PathLike | Mapping[str, Tensor] | None
    target_weights: str | PathLike | Mapping[str, Tensor] | None
    keep_original: bool
    allow_unmatched: bool
    cache: bool
    verify: Any


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    *,
    dry_run: Literal[False] = False,
    **settings: Unpack[CallSettings],
) -> LoraModel: ...


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    *,
    dry_run: Literal[True],
    **settings: Unpack[CallSettings],
) -> Plan: ...


@overload
def get_peft_model(
    model: nn.Module, peft_config: LoraConfig, *, dry_run: bool, **settings: Unpack[CallSettings]
) -> LoraModel | Plan: ...


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    *,
    calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | Calibration | None = None,
    calibration_memory: int | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    seed: int = 0,
    dry_run: bool = False,
    quantized_base: str = "in_forward",
    original_weights: str | PathLike | Mapping[str, Tensor] | None = None,
    target_weights: str | PathLike | Mapping[str, Tensor] | None = None,
    keep_original: bool = False,
    allow_unmatched: bool = False,
    cache: bool = True,
    verify: Any = None,
) -> LoraModel | Plan:
    """Add a low-rank adapter to `model`, initialized by `peft_config.init_lora_weights`.

    Args:
        model: any torch model. Its targeted modules are wrapped in place and its parameters
            frozen; `list_initializers()` shows the module types that a method supports. If the
            call fails, the model is unchanged.
        peft_config: the settings.
        calibration: any iterable of batches, or the result of `lora_init.calibrate`, for methods
            that read inputs or gradients (see `list_initializers()`); other methods ignore it. A
            method that compares several sets takes a dict of them, such as
            ``{"learn": batches, "keep": batches}``. A
            batch that is a mapping is passed as ``model(**batch)``. For gradients, batches need
            labels, from which the model computes its loss, or `WithLoss` supplies a loss function.
            Under `torch.distributed`, each rank passes its part of the batches. All ranks get the
            adapter that a single process computes from all batches.
        calibration_memory: bytes for the second moments of the inputs (4 n² each). If they do not
            fit, the calibration takes several passes, each for the layers that fit. The result is
            the same, but it takes longer. The batches must support repeated iteration. If
            gradients do not fit, lora_ga and lora_one approximate their leading triplets from four
            passes over the same batches; `lora_init.calibration.sketch` states the error.
        adapter_dtype: dtype of the factors. float32 also suits 16-bit bases, where rounded factors
            are less accurate.
        device: where the decompositions run, for example "cuda". "auto" means CUDA if available;
            None means the device of each weight. They run on the CPU where that device has no
            float64, as Apple's "mps".
        seed: the initialization seed. Each layer derives a random stream from it and its name.
        dry_run: return the plan (targets, ranks, parameters, memory, statistics, unmatched keys)
            and do not change the model.
        quantized_base: how a method subtracts from a quantized base (bitsandbytes' Linear4bit and
            Linear8bitLt). "in_forward" keeps the base and subtracts s B0 A0 in the forward pass,
            so the output is preserved exactly. "requantize" quantizes the residual with the
            module's settings: it needs no second product, but has an error that `init_report()`
            shows.
        original_weights: the model's checkpoint: a folder or file of safetensors, or a mapping of
            names to tensors. It is read one layer at a time, for weights that the model does not
            hold.
            For quantized targets, methods then decompose the unquantized weights. Methods that
            replace the base require it, to correct the quantization error.
            For targets on the meta device (``torch.device("meta")``,
            ``accelerate.init_empty_weights()``), the base stays there and the factors are on the
            CPU. `save_pretrained` writes the adapter for the loaded model.
            Weights that Accelerate offloads need no checkpoint.
        target_weights: the second weights, for methods that read "target_weight": a checkpoint, as
            for `original_weights`, or the folder of an adapter on the same base. It is read one
            layer at a time.
        keep_original: keep a copy of a replaced base, so that disable_adapter and unload work.
            Float weights are kept in CPU memory, packed weights on their device.
        allow_unmatched: warn about keys in rank_pattern and alpha_pattern that match no target,
            instead of raising an error.
        cache: use the user's cache folder for decompositions, and for statistics of batches in a
            list (see `lora_init.cache`). The environment variable LORA_INIT_CACHE=off disables it.
        verify: one batch to run after the adapter is added (see `lora_init.model.verification`).
            The call fails if the model ignores an adapted layer, or if its output changes under a
            method that preserves it. A layer that the batch does not reach causes a warning.

    Returns:
        A `LoraModel`, or the `Plan` for `dry_run`.

    Raises:
        ValueError, TypeError, NotImplementedError: a setting is not supported. The message names
            the setting, its value, the supported values and the fix. The model is unchanged.
    """
    check_model(model)
    peft_config = checked_config("peft_config", peft_config)
    if not isinstance(calibration, Calibration):
        check_calibration(calibration)
    injection.refuse_adapted(model)
    peft_config = with_new_heads(model, peft_config)
    attentions = attention_targets(model, [peft_config])
    with split_on_success(model, attentions, join_after=dry_run):
        plan = make_plan(
            model,
            peft_config,
            adapter_dtype,
            quantized_base=quantized_base,
            calibration_memory=calibration_memory,
        )
        plan.warn_of_left_out()
        _warn_of_peft(model, plan)
        if dry_run:
            return plan
        weights = BaseWeights(
            model, original_weights, second_weights(model, target_weights, plan.initializer)
        )
        check_call(plan, weights, calibration, allow_unmatched)
        return injection.atomically(
            partial(
                _assemble, model, peft_config, plan, weights, calibration, device, seed,
                keep_original, cache, verify,
            )
        )  # fmt: skip


@overload
def reinitialize(
    model: LoraModel,
    peft_config: LoraConfig,
    *,
    dry_run: Literal[False] = False,
    **settings: Unpack[CallSettings],
) -> LoraModel: ...


@overload
def reinitialize(
    model: LoraModel,
    peft_config: LoraConfig,
    *,
    dry_run: Literal[True],
    **settings: Unpack[CallSettings],
) -> Plan: ...


@overload
def reinitialize(
    model: LoraModel, peft_config: LoraConfig, *, dry_run: bool, **settings: Unpack[CallSettings]
) -> LoraModel | Plan: ...


def reinitialize(model: LoraModel, peft_config: LoraConfig, **settings: Any) -> LoraModel | Plan:
    """Replace the adapter of a model in memory by a newly initialized one.

    The trained factors are discarded. The base model is restored without reloading it.

    Args:
        model: the adapted model; afterwards use the returned model instead.
        peft_config, settings: as in `get_peft_model`.

    Raises:
        RuntimeError: a base was replaced and its original was not kept.
        ValueError, TypeError: as in `get_peft_model`; the model then keeps its adapter.
    """
    return injection.atomically(partial(_restart, model, peft_config, settings))


def _restart(
    model: LoraModel,
    peft_config: LoraConfig,
    settings: Mapping[str, Any],
    transaction: injection.Transaction,
) -> LoraModel | Plan:
    model.detach_adapter(transaction)
    if settings.get("dry_run"):
        plan = get_peft_model(model.base_model, peft_config, **settings)
        transaction.roll_back()
        return plan
    return get_peft_model(model.base_model, peft_config, **settings)  # nothing may fail after it


@torch.inference_mode(False)  # tensors from inference mode cannot be trained
def _assemble(
    model: nn.Module,
    config: LoraConfig,
    plan: Plan,
    weights: BaseWeights,
    calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | Calibration | None,
    device: str | torch.device | None,
    seed: int,
    keep_original: bool,
    use_cache: bool,
    verify: Any,
    transaction: injection.Transaction,
) -> LoraModel:
    """Calibrate, allocate ranks, initialize and inject; measure the time of each step."""
    spec = plan.initializer
    transaction.undo_by(partial(uncover_methods, model))
    plain = injection.hold_plain(model, transaction)
    seconds: dict[str, float] = dict.fromkeys(
        ("calibration", "allocation", "initialize", "inject"), 0.0
    )
    plan, initialized, tokens = computed_layers(
        plan, config, weights, calibration, device, seed, use_cache, seconds
    )
    if spec.allocates:
        config = plan.explicit(config)
    initialized = fused_layers(plan, _with_figures(weights, initialized))
    preserved = spec.preserves_output and not plan.replaced
    checked = verify is not None and preserved
    expected = original_output(model, verify) if checked else None
    reshard(model)
    with timed(seconds, "inject"):
        done = injection.inject_factors(
            model,
            plan,
            {layer.target.name: layer.factors for layer in initialized},
            transaction=transaction,
            weights=weights,
            plain=plain,
            keep_original=keep_original or verify is not None,
        )
    seconds["total"] = sum(seconds.values())
    report = InitReport(
        method=spec.name,
        options=dataclasses.asdict(plan.options),
        base=spec.base,
        needs_calibration=plan.calibration is not None,
        seconds=seconds,
        calibration_tokens=tokens,
        layers=[],
    )
    metrics = {layer.target.name: dict(layer.factors.metrics) for layer in initialized}
    times = {layer.target.name: layer.seconds for layer in initialized}
    made = LoraModel(model, config, plan, done, report, metrics, times)
    if verify is not None:
        _verify(made, verify, expected)
        if not keep_original:
            injection.forget_originals(model, done)
    return made


def _verify(model: LoraModel, batch: Any, expected: Any) -> None:
    """Raise an error if the model does not use its adapted layers; see `get_peft_model`."""
    layers = model.layers
    uses = verify_adapted(
        model.base_model,  # a pass of `model` would also watch the layers
        layers | model.trained_modules(),
        {name: layer.base_layer for name, layer in layers.items()}
        | {name: part.original_module for name, part in model.trained_modules().items()},
        batch,
        expected=expected,
        disabled=None if expected is None else model.disable_adapter,
    )
    model.assume_used(uses)


def _warn_of_peft(model: nn.Module, plan: Plan) -> None:
    """Warn if PEFT would load the saved adapter onto different modules."""
    if differences := different_in_peft(model, plan):
        warnings.warn(
            "PEFT would load the saved adapter differently; load it with "
            f"LoraModel.from_pretrained, or leave these out: {describe_differences(differences)}",
            stacklevel=3,
        )


def _with_figures(
    weights: BaseWeights, initialized: list[InitializedLayer]
) -> list[InitializedLayer]:
    """The layers; those whose weight will be replaced with the report's figures of it."""
    layers = []
    for layer in initialized:
        factors = layer.factors
        if factors.replacement is not None:
            weight, scaling = weights.weight(layer.target), layer.target.scaling
            figures = weight_figures(weight, factors.lora_A, factors.lora_B, scaling)
            factors = dataclasses.replace(factors, metrics={**figures, **factors.metrics})
        layers.append(dataclasses.replace(layer, factors=factors))
    return layers
