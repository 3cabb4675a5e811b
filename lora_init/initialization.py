"""Plan and statistics -> factors, layer by layer. Pure: no module is changed here."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_init.base_weights import BaseWeights
from lora_init.factors import Factors, Replacement, low_rank_product
from lora_init.modules import oriented_weight, widened
from lora_init.packed import quantizer_of
from lora_init.plan import Plan, Target
from lora_init.progress import tracked
from lora_init.quantization import Quantizer
from lora_init.registry import Initializer
from lora_init.seeding import layer_generator
from lora_init.statistics import LayerStatistics


@dataclass(frozen=True)
class InitializedLayer:
    """A target's factors, on its module's device and in the adapter's dtype, and their cost."""

    target: Target
    factors: Factors
    seconds: float


def initialize(
    weights: BaseWeights,
    plan: Plan,
    statistics: Mapping[str, LayerStatistics],
    *,
    seed: int,
    device: torch.device | None = None,
) -> list[InitializedLayer]:
    """Run the plan's method over its targets.

    Args:
        weights: of the targets, only read.
        plan: what to do.
        statistics: by layer name; empty for methods that need none.
        seed: the initialization seed; each layer derives a stream of its own from it and its name.
        device: where the decompositions run; None means where each weight lives. Weights move
            there one at a time, results return to their module's device.

    Raises:
        ValueError: a weight or a factor is not finite, or a factor has the wrong shape; by name.
    """
    return [
        _initialize_layer(weights, target, plan, statistics.get(target.name), seed, device)
        for target in tracked(plan.targets, f"initializing ({plan.initializer.name})")
    ]


def _initialize_layer(
    weights: BaseWeights,
    target: Target,
    plan: Plan,
    statistics: LayerStatistics | None,
    seed: int,
    device: torch.device | None,
) -> InitializedLayer:
    start = time.perf_counter()
    spec = plan.initializer
    module = weights.model.get_submodule(target.name)
    home = module.weight.device
    if "weights" in spec.needs:
        weight = widened(weights.weight(target).to(device or home)).to(torch.float32)
    elif target.quantized:
        weight = torch.empty(target.shape, device="meta")  # its shape is all that is read
    else:
        weight = oriented_weight(module)
    if not weight.is_meta:
        _check_weight(target, weight)
    if target.quantized:
        statistics = replace(statistics or LayerStatistics(), quantizer=quantizer_of(module))
    factors = spec.function_for(target.module_type)(
        weight,
        target.rank,
        target.scaling,
        statistics,
        plan.options,
        layer_generator(seed, target.name),
    )
    _check_factors(target, spec, factors)
    factors = replace(
        factors,
        lora_A=_settled(factors.lora_A, home, plan.adapter_dtype),
        lora_B=_settled(factors.lora_B, home, plan.adapter_dtype),
        replacement=_settled_replacement(factors.replacement, home),
    )
    if plan.requantizes and target.quantized:
        factors = _requantized(factors, weight.to(home), target, statistics.quantizer)
    for place in {home, device or home}:
        if place.type == "cuda":  # else the time is that of handing over the work
            torch.cuda.synchronize(place)
    return InitializedLayer(target, factors, time.perf_counter() - start)


def _requantized(factors: Factors, weight: Tensor, target: Target, quantizer: Quantizer) -> Factors:
    """A subtracting method's factors on a base that takes the residual, and what that costs."""
    # As they are stored: what is added back must be what was subtracted.
    lora_A, lora_B = factors.lora_A.float(), factors.lora_B.float()
    replacement = Replacement(quantizer, lora_A, lora_B)
    norm = torch.linalg.matrix_norm(weight)
    before = torch.linalg.matrix_norm(weight - quantizer.roundtrip(weight)) / norm
    product = low_rank_product(lora_A, lora_B, target.scaling)
    error = torch.linalg.matrix_norm(weight - replacement.base(weight, target.scaling) - product)
    figures = {
        "error": float(error / norm),
        "error_without_adapter": float(before),
        "quantizer": quantizer.name,
    }
    return replace(factors, replacement=replacement, metrics={**factors.metrics, **figures})


def _settled(factor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    # A contiguous tensor of its own: a view would keep the whole decomposition in memory.
    return factor.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def _settled_replacement(
    replacement: Replacement | None, device: torch.device
) -> Replacement | None:
    if replacement is None:
        return None
    return replace(
        replacement,
        lora_A=_settled(replacement.lora_A, device, torch.float32),
        lora_B=_settled(replacement.lora_B, device, torch.float32),
    )


def _check_weight(target: Target, weight: Tensor) -> None:
    # One reading of the weight; only a norm beyond the type's range needs the second look.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(weight, dtype=dtype))
    if not math.isfinite(norm) and not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"target {target.name!r}: its weight holds NaN or infinite values; the checkpoint is "
            "damaged, or was read in a dtype that it overflows"
        )


def _check_factors(target: Target, spec: Initializer, factors: Factors) -> None:
    rows, columns = target.shape
    for name, factor, shape in (
        ("lora_A", factors.lora_A, (target.rank, columns)),
        ("lora_B", factors.lora_B, (rows, target.rank)),
    ):
        if tuple(factor.shape) != shape:
            raise ValueError(
                f"{spec.name} returned {name} of shape {tuple(factor.shape)} for target "
                f"{target.name!r}; expected {shape}"
            )
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(
                f"{spec.name} returned non-finite values in {name} for target {target.name!r}"
            )
    if not bool(factors.lora_A.any()) and not bool(factors.lora_B.any()):
        warnings.warn(
            f"target {target.name!r} starts with both factors zero under {spec.name} (its weight, "
            "or what the method decomposes, is zero): it gets no gradient and will not learn; "
            "leave it out (exclude_modules) or choose another method",
            stacklevel=2,
        )
    if (factors.replacement is not None) != (spec.base == "replace"):
        raise ValueError(
            f"{spec.name} is registered with base={spec.base!r} but its result "
            f"{'has' if factors.replacement is not None else 'lacks'} a replacement"
        )
