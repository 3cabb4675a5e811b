"""`get_peft_model`: plan, statistics, allocation, initialization, injection, in this order."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lora_init import injection
from lora_init.adapters.peft_selection import describe_differences, different_in_peft
from lora_init.cache import Cache, default_cache
from lora_init.calibration.batches import check_batches
from lora_init.calibration.calibrate import calibrate, calibrated, for_allocation
from lora_init.calibration.result import Calibration
from lora_init.config.lora_config import LoraConfig
from lora_init.initialize.run import InitializedLayer, initialize
from lora_init.initialize.single import init_factors
from lora_init.layer import LayerRequest
from lora_init.linalg.matrix import refuse_non_finite
from lora_init.model.base_methods import uncover_methods
from lora_init.model.lora_model import LoraModel
from lora_init.model.verification import original_output, verify_adapted
from lora_init.plan.make import check_model, checked_config, make_plan
from lora_init.plan.new_weights import with_new_heads
from lora_init.plan.plan import Plan, Target
from lora_init.report import InitReport, weight_figures
from lora_init.weights.offload import first_unloaded
from lora_init.weights.source import BaseWeights

__all__ = ["calibrate", "get_peft_model", "init_factors", "reinitialize"]


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    *,
    calibration: Iterable[Any] | Calibration | None = None,
    calibration_memory: int | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    seed: int = 0,
    dry_run: bool = False,
    quantized_base: str = "in_forward",
    original_weights: str | PathLike | Mapping[str, Tensor] | None = None,
    keep_original: bool = False,
    allow_unmatched: bool = False,
    cache: bool = True,
    verify: Any = None,
) -> LoraModel | Plan:
    """Give `model` a low-rank adapter, started as `peft_config.init_lora_weights` says.

    Args:
        model: any torch model; its targeted modules (`list_initializers()` says which types a
            method serves) are wrapped in place and its parameters frozen. Left untouched if
            anything fails.
        peft_config: the settings.
        calibration: batches for the methods that need them (`list_initializers()` says which need
            inputs or gradients): any iterable; a mapping is passed as ``model(**batch)``. For
            gradients the batches need labels, from which the model computes its loss, or a loss of
            yours: `WithLoss`. Others do not read it. Or what `lora_init.calibrate` found before.
            Under `torch.distributed` every rank calls with batches of its own, as many as it has;
            all get the adapter of one process with all the data.
        calibration_memory: bytes for the inputs' second moments (4 n² each). If they do not fit,
            there are several passes over the batches, each for the layers that fit, which are
            initialized before the next: the same result for more time. Needs batches that can be
            read again.
        adapter_dtype: of the factors; float32 also for 16-bit bases, where rounded factors cost
            accuracy (relative error 2.3e-3 against 4.5e-4 on a bfloat16 base).
        device: where the decompositions run, e.g. "cuda", wherever the model is; "auto": on CUDA
            if it is there; None: where each weight lives.
        seed: of the initialization. Every layer has a stream of its own, keyed by its name.
        dry_run: return the plan (targets, ranks, parameters, memory, statistics, unmatched keys)
            and change nothing.
        quantized_base: what a subtracting method does to a base that is quantised (bitsandbytes'
            Linear4bit and Linear8bitLt). "in_forward" leaves it untouched and subtracts s B0 A0 in
            the forward pass: the output is preserved exactly. "requantize" quantises the residual
            with the module's own settings: no second product, an error that `init_report()` shows.
        original_weights: the model's checkpoint (a folder or file of safetensors, or a mapping of
            names to tensors), read one layer at a time, for weights that the model does not hold.
            Of quantised targets: methods decompose the weights from before quantisation; those that
            replace the base need them, to make up for its error. Of targets on the meta device (a
            model built under ``torch.device("meta")`` or ``accelerate.init_empty_weights()``,
            larger than memory perhaps): the base stays there, the factors are on the CPU,
            `save_pretrained` writes the adapter for the loaded model. Weights that Accelerate
            offloads need no checkpoint: they are read from where it keeps them.
        keep_original: keep what a replaced base was (float weights in CPU memory, packed ones as
            they are), so that disable_adapter and unload work.
        allow_unmatched: warn of keys in rank_pattern and alpha_pattern that match nothing, instead
            of refusing them.
        cache: keep decompositions, and statistics of batches given as a list, in the user's cache
            folder, and take those that are there (see `lora_init.cache`). The environment's
            LORA_INIT_CACHE=off switches it off everywhere.
        verify: one batch, run once the adapter is in place (see `lora_init.model.verification`). A
        model
            that ignores an adapted layer, or whose output changes under a method that preserves
            it, is refused and put back as it was. A layer that the batch does not reach is warned
            about.

    Returns:
        A `LoraModel`, or the `Plan`.

    Raises:
        ValueError, TypeError, NotImplementedError: a setting that cannot be served, with its name,
            its value, what is allowed and what to do; the model is unchanged then.
    """
    check_model(model)
    peft_config = checked_config("peft_config", peft_config)
    if not isinstance(calibration, Calibration):
        check_batches(calibration)
    injection.refuse_adapted(model)
    peft_config = with_new_heads(model, peft_config)
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
    weights = BaseWeights(model, original_weights)
    check_call(plan, weights, calibration, allow_unmatched)
    place = device_for(device)
    return injection.atomically(
        partial(
            _assemble, model, peft_config, plan, weights, calibration, place, seed,
            keep_original, default_cache() if cache else None, verify,
        )
    )  # fmt: skip


def reinitialize(model: LoraModel, peft_config: LoraConfig, **settings: Any) -> LoraModel | Plan:
    """Start the adapter of a live model again, by the same or another method.

    The trained adapter is given up; the base model is the original one, in memory all the time.

    Args:
        model: its adapter is gone afterwards: use the model that is returned.
        peft_config, settings: as of `get_peft_model`.

    Raises:
        RuntimeError: a base was replaced and its original not kept.
        ValueError, TypeError: as `get_peft_model`; the model keeps its adapter as it is then.
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


@torch.inference_mode(False)  # tensors made in inference mode cannot be trained
def _assemble(
    model: nn.Module,
    config: LoraConfig,
    plan: Plan,
    weights: BaseWeights,
    calibration: Iterable[Any] | Calibration | None,
    device: torch.device | None,
    seed: int,
    keep_original: bool,
    cache: Cache | None,
    verify: Any,
    transaction: injection.Transaction,
) -> LoraModel:
    """Everything after the checks, timed step by step."""
    spec = plan.initializer
    transaction.undo_by(partial(uncover_methods, model))
    plain = injection.hold_plain(model, transaction)
    seconds = dict.fromkeys(("calibration", "allocation", "initialize", "inject"), 0.0)
    parts = calibrated(plan, model, calibration, device, cache)
    if spec.allocates:
        with _timed(seconds, "calibration"):
            whole = for_allocation(plan, parts)
        with _timed(seconds, "allocation"):
            plan = allocated(plan, config, whole, weights)
        config = plan.explicit(config)
        parts = iter([whole])

    initialized: list[InitializedLayer] = []
    while True:
        with _timed(seconds, "calibration"):
            part = next(parts, None)
        if part is None:
            break
        with _timed(seconds, "initialize"):
            here = plan.only(part.layers)
            initialized += initialize(
                weights, here, part.layers, seed=seed, device=device, cache=cache
            )
        tokens = part.tokens
        part = None  # the next pass needs its room

    figures = _figures_before_replacement(weights, initialized)
    preserved = spec.preserves_output and not plan.replaced
    checked = verify is not None and preserved
    expected = original_output(model, verify) if checked else None
    with _timed(seconds, "inject"):
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
    for name, taken in figures.items():
        metrics[name] = taken | metrics[name]
    times = {layer.target.name: layer.seconds for layer in initialized}
    made = LoraModel(model, config, plan, done, report, metrics, times)
    if verify is not None:
        _verify(made, verify, expected)
        if not keep_original:
            injection.forget_originals(model, done)
    return made


def _verify(model: LoraModel, batch: Any, expected: Any) -> None:
    """Refuse a model that does not use its adapted layers; see `get_peft_model`."""
    layers = model.layers
    uses = verify_adapted(
        model.base_model,  # its own first pass would watch the layers too
        layers | model.trained_modules(),
        {name: layer.base_layer for name, layer in layers.items()}
        | {name: part.original_module for name, part in model.trained_modules().items()},
        batch,
        expected=expected,
        disabled=None if expected is None else model.disable_adapter,
    )
    model.assume_used(uses)


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] += time.perf_counter() - start


def check_call(
    plan: Plan,
    weights: BaseWeights,
    calibration: Iterable[Any] | Calibration | None,
    allow_unmatched: bool,
) -> None:
    """Refuse what the plan and the arguments together cannot do; warn of what they should not."""
    spec = plan.initializer
    plan.refuse_unmatched(allowed=allow_unmatched)
    weights.check(plan.targets)
    if not isinstance(calibration, Calibration):
        _check_forward(plan, weights.model)
    if plan.calibration is not None and calibration is None:
        labels = ", each with labels" if plan.calibration.gradients else ""
        raise ValueError(
            f"init_lora_weights={spec.name!r} needs calibration data: pass calibration=<iterable "
            f"of batches>, e.g. a list of tokenizer outputs{labels}"
        )
    if plan.requantizes and not plan.replaced:
        raise ValueError(
            "quantized_base='requantize', but no target is quantised; leave it out, or load the "
            "model with a quantization_config"
        )
    quantized = [target.name for target in plan.targets if not weights.is_original(target)]
    if spec.base == "replace" and quantized:
        raise ValueError(
            f"target {quantized[0]!r} is quantised already, and {spec.name} makes up for what its "
            "quantisation lost: pass original_weights=<the unquantised checkpoint's folder>, or "
            "the unquantised model"
        )
    if plan.dropout > 0 and spec.base != "keep":
        warnings.warn(
            f"lora_dropout={plan.dropout} with {spec.name}: the adapter carries part "
            "of the base's own function, so dropping its inputs disturbs the model from the first "
            "step on; lora_dropout=0.0 is what these methods' papers use",
            stacklevel=3,
        )


def _check_forward(plan: Plan, model: nn.Module) -> None:
    """Refuse a calibration pass through a model that is not loaded."""
    if plan.calibration is not None and (name := first_unloaded(model)):
        raise ValueError(
            f"init_lora_weights={plan.initializer.name!r} needs a forward pass, and {name!r} is on "
            "the meta device; pass calibration=<what lora_init.calibrate found on the loaded "
            "model>, or have Accelerate offload it (device_map='auto', offload_folder=...)"
        )


def _warn_of_peft(model: nn.Module, plan: Plan) -> None:
    """Warn where PEFT would load the saved adapter onto other modules."""
    if differences := different_in_peft(model, plan):
        warnings.warn(
            "PEFT would read the saved adapter otherwise; load it with LoraModel.from_pretrained, "
            f"or leave these out: {describe_differences(differences)}",
            stacklevel=3,
        )


def device_for(device: str | torch.device | None) -> torch.device | None:
    if device is None or (device == "auto" and not torch.cuda.is_available()):
        return None
    place = torch.device("cuda" if device == "auto" else device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: no CUDA device is present; use device=None")
    return place


def allocated(
    plan: Plan, config: LoraConfig, statistics: Calibration, weights: BaseWeights
) -> Plan:
    """The plan with the allocator's ranks.

    Raises:
        ValueError: no rank was allocated to any layer; a weight it reads is not finite, by name.
    """

    def read(target: Target) -> Tensor:
        weight = weights.weight(target)
        refuse_non_finite(target.name, weight)
        return weight

    requests = {
        target.name: LayerRequest(
            target.rank, target.shape, statistics.layers[target.name], partial(read, target)
        )
        for target in plan.targets
    }
    ranks = plan.options.allocate(requests)
    if not any(ranks.values()):
        raise ValueError(
            f"{plan.initializer.name}: no layer's inputs vary over the calibration data, so no "
            "rank was allocated; pass real, varied batches"
        )
    return plan.with_ranks(ranks, config)


def _figures_before_replacement(
    weights: BaseWeights, initialized: list[InitializedLayer]
) -> dict[str, dict[str, Any]]:
    """The report's figures of layers whose weight will be lost."""
    return {
        layer.target.name: weight_figures(
            weights.weight(layer.target),
            layer.factors.lora_A,
            layer.factors.lora_B,
            layer.target.scaling,
        )
        for layer in initialized
        if layer.factors.replacement is not None
    }
