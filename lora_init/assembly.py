"""`get_peft_model`: plan, statistics, allocation, initialization, injection, in this order."""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lora_init import injection
from lora_init.allocation import LayerRequest
from lora_init.config import LoraConfig
from lora_init.diagnostics import InitReport, weight_figures
from lora_init.initialization import InitializedLayer, initialize
from lora_init.model import LoraModel
from lora_init.modules import oriented_weight
from lora_init.plan import Plan, make_plan
from lora_init.statistics import Calibration, collect


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    *,
    calibration: Iterable[Any] | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    seed: int = 0,
    dry_run: bool = False,
) -> LoraModel | Plan:
    """Give `model` a low-rank adapter, started as `peft_config.init_lora_weights` says.

    Args:
        model: any torch model; its targeted nn.Linear and Conv1D modules are wrapped in place and
            its parameters frozen. Left untouched if anything fails.
        peft_config: the settings.
        calibration: batches for the methods that need them (corda, eva): any iterable; a mapping
            is passed as ``model(**batch)``. Others do not read it.
        adapter_dtype: of the factors; float32 also for 16-bit bases, where rounded factors cost
            accuracy (relative error 2.3e-3 against 4.5e-4 on a bfloat16 base).
        device: where the decompositions run, e.g. "cuda"; None: where each weight lives.
        seed: of the initialization. Every layer has a stream of its own, keyed by its name.
        dry_run: return the plan (targets, ranks, parameters, memory, statistics, unmatched keys)
            and change nothing.

    Returns:
        A `LoraModel`, or the `Plan`.

    Raises:
        ValueError, TypeError, NotImplementedError: a setting that cannot be served, with its name,
            its value, what is allowed and what to do; the model is unchanged then.
    """
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__module__}.{type(peft_config).__name__}; pass "
            "a lora_init.LoraConfig (LoraConfig.from_dict(config.to_dict()) converts PEFT's)"
        )
    injection.refuse_adapted(model)
    plan = make_plan(model, peft_config, adapter_dtype)
    if dry_run:
        return plan
    plan.refuse_unmatched()
    spec = plan.initializer
    place = _device(device)
    if plan.calibration is not None and calibration is None:
        raise ValueError(
            f"init_lora_weights={spec.name!r} needs calibration data: pass calibration=<iterable "
            "of batches>, e.g. a list of tokenizer outputs"
        )
    if peft_config.lora_dropout > 0 and spec.base != "keep":
        warnings.warn(
            f"lora_dropout={peft_config.lora_dropout} with {spec.name}: the adapter carries part "
            "of the base's own function, so dropping its inputs disturbs the model from the first "
            "step on; lora_dropout=0.0 is what these methods' papers use",
            stacklevel=2,
        )
    config = copy.deepcopy(peft_config)
    seconds = {}
    start = time.perf_counter()

    statistics = Calibration({})
    if plan.calibration is not None:
        names = [target.name for target in plan.targets]
        statistics = collect(model, names, plan.calibration, calibration, device=place)
    seconds["calibration"] = time.perf_counter() - start

    mark = time.perf_counter()
    if spec.allocate is not None:
        plan = _allocated(plan, config, statistics)
        config = plan.explicit(config)
    seconds["allocation"] = time.perf_counter() - mark

    mark = time.perf_counter()
    initialized = initialize(model, plan, statistics.layers, seed=seed, device=place)
    seconds["initialize"] = time.perf_counter() - mark

    figures = _figures_before_replacement(model, initialized)
    mark = time.perf_counter()
    done = injection.inject(
        model,
        plan,
        {layer.target.name: layer.factors for layer in initialized},
        dropout=config.lora_dropout,
    )
    seconds["inject"] = time.perf_counter() - mark
    seconds["total"] = sum(seconds.values())
    report = InitReport(
        method=spec.name,
        options=dataclasses.asdict(plan.options),
        base=spec.base,
        needs_calibration=plan.calibration is not None,
        seconds=seconds,
        calibration_tokens=statistics.tokens,
        layers=[],
    )
    metrics = {layer.target.name: dict(layer.factors.metrics) for layer in initialized}
    for name, taken in figures.items():
        metrics[name] = taken | metrics[name]
    times = {layer.target.name: layer.seconds for layer in initialized}
    return LoraModel(model, config, plan, done, report, metrics, times)


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: no CUDA device is present; use device=None")
    return place


def _allocated(plan: Plan, config: LoraConfig, statistics: Calibration) -> Plan:
    """The plan with the allocator's ranks."""
    requests = {
        target.name: LayerRequest(target.rank, target.shape, statistics.layers[target.name])
        for target in plan.targets
    }
    ranks = plan.initializer.allocate(requests, plan.options)
    if not any(ranks.values()):
        raise ValueError(
            f"{plan.initializer.name}: no layer's inputs vary over the calibration data, so no "
            "rank was allocated; pass real, varied batches"
        )
    return plan.with_ranks(ranks, config)


def _figures_before_replacement(
    model: nn.Module, initialized: list[InitializedLayer]
) -> dict[str, dict[str, Any]]:
    """The report's figures of layers whose weight will be lost."""
    return {
        layer.target.name: weight_figures(
            oriented_weight(model.get_submodule(layer.target.name)),
            layer.factors.lora_A,
            layer.factors.lora_B,
            layer.target.scaling,
        )
        for layer in initialized
        if layer.factors.replacement is not None
    }
