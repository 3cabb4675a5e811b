"""The steps of a start: check the call, calibrate, allocate ranks, and compute the factors."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_init.cache import default_cache
from lora_init.calibration.calibrate import calibrated, for_allocation
from lora_init.calibration.result import Calibration
from lora_init.calibration.sets import check_sets
from lora_init.initialize.run import InitializedLayer, initialize
from lora_init.layer import LayerRequest
from lora_init.linalg.matrix import refuse_non_finite
from lora_init.linalg.precision import device_for
from lora_init.plan.plan import Plan, Target
from lora_init.plan.sharded import check_sharded_calibration
from lora_init.weights.offload import first_unloaded
from lora_init.weights.sharded import reshard
from lora_init.weights.source import BaseWeights

if TYPE_CHECKING:
    from lora_init.config.lora_config import LoraConfig


def check_call(
    plan: Plan,
    weights: BaseWeights,
    calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | Calibration | None,
    allow_unmatched: bool,
) -> None:
    """Raise an error or a warning for arguments that do not fit the plan."""
    spec = plan.initializer
    plan.refuse_unmatched(allowed=allow_unmatched)
    weights.check(plan.targets)
    if not isinstance(calibration, Calibration):
        _check_forward(plan, weights.model, calibration)
    if plan.calibration is not None and calibration is None:
        labels = ", each with labels" if plan.calibration.gradients else ""
        raise ValueError(
            f"init_lora_weights={spec.name!r} needs calibration data: pass calibration=<iterable "
            f"of batches>, e.g. a list of tokenizer outputs{labels}{_sets(plan)}"
        )
    if weights.second is not None:
        weights.second.check(weights, plan.targets)
    if plan.calibration is not None:
        check_sets(spec.name, plan.calibration, calibration)
    if plan.requantizes and not plan.replaced:
        raise ValueError(
            "quantized_base='requantize' is not supported: no target is quantized. Leave it out, "
            "or load the model with a quantization_config"
        )
    quantized = [target.name for target in plan.targets if not weights.is_original(target)]
    if spec.base == "replace" and quantized:
        raise ValueError(
            f"target {quantized[0]!r} is quantized already, and {spec.name} needs its unquantized "
            "weight: pass original_weights=<folder of the unquantized checkpoint>, or the "
            "unquantized model"
        )
    if plan.dropout > 0 and spec.base != "keep":
        warnings.warn(
            f"lora_dropout={plan.dropout} with {spec.name}: the adapter contains a part of the "
            "base weight, so dropout changes the pretrained function from the first step on. Use "
            "lora_dropout=0.0, as this method's paper does",
            stacklevel=3,
        )


def _sets(plan: Plan) -> str:
    """How to name the sets that a plan's method compares."""
    names = plan.calibration.sets if plan.calibration is not None else ()
    return f", as a dict of the sets {', '.join(map(repr, names))}" if names else ""


def _check_forward(plan: Plan, model: nn.Module, calibration: Any) -> None:
    """Raise ValueError if the calibration would run a model that is not whole in memory."""
    if plan.calibration is None:
        return
    names = [target.name for target in plan.targets]
    check_sharded_calibration(
        model, names, plan.initializer.name, calibration, gradients=plan.calibration.gradients
    )
    if name := first_unloaded(model):
        raise ValueError(
            f"init_lora_weights={plan.initializer.name!r} needs a forward pass, and {name!r} is on "
            "the meta device; pass calibration=<result of lora_init.calibrate on the loaded "
            "model>, or let Accelerate offload it (device_map='auto', offload_folder=...)"
        )


def computed_layers(
    plan: Plan,
    config: LoraConfig,
    weights: BaseWeights,
    calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | Calibration | None,
    device: str | torch.device | None,
    seed: int,
    use_cache: bool,
    seconds: dict[str, float],
) -> tuple[Plan, list[InitializedLayer], int]:
    """Calibrate, allocate ranks and compute the factors, without a change to the model.

    Args:
        plan: the plan of `config`.
        config: what the user configured.
        weights: the base weights; `weights.model` runs the calibration.
        calibration, device, seed, use_cache: as of `get_peft_model`.
        seconds: receives the times of "calibration", "allocation" and "initialize".

    Returns:
        The plan with the allocated ranks, a layer per matrix, and the number of calibration tokens.
    """
    model, place, tokens = weights.model, device_for(device), 0
    cache = default_cache() if use_cache else None
    parts = calibrated(plan.in_matrices(), model, calibration, place, cache)
    if plan.initializer.allocates:
        with timed(seconds, "calibration"):
            whole = for_allocation(plan.in_matrices(), parts)
        with timed(seconds, "allocation"):
            plan = _allocated(plan, config, whole, weights)
        parts = iter([whole])

    matrices = plan.in_matrices()
    layers: list[InitializedLayer] = []
    while True:
        with timed(seconds, "calibration"):
            part = next(parts, None)
        if part is None:
            return plan, layers, tokens
        reshard(model)
        with timed(seconds, "initialize"):
            here = matrices.only(part.layers)
            layers += initialize(weights, here, part.layers, seed=seed, device=place, cache=cache)
        tokens = part.tokens
        part = None  # frees memory for the next pass


def _allocated(
    plan: Plan, config: LoraConfig, statistics: Calibration, weights: BaseWeights
) -> Plan:
    """The plan with the ranks that the method's allocator chooses.

    Raises:
        ValueError: all ranks are 0, or a weight that the allocator reads is not finite.
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
        if not target.has_fixed_rank
    }
    fixed = {target.name: target.rank for target in plan.targets if target.has_fixed_rank}
    ranks = (plan.options.allocate(requests) if requests else {}) | fixed
    if not any(ranks.values()):
        raise ValueError(
            f"{plan.initializer.name}: no layer's inputs vary over the calibration data, so all "
            "ranks would be 0; pass real, varied batches"
        )
    return plan.with_ranks(ranks, config)


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Add the time of a block to that of its step."""
    start = time.perf_counter()
    yield
    seconds[step] += time.perf_counter() - start
