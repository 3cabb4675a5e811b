"""Initialization: compute the factors of all planned layers, without changing a module."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init import linalg
from lora_init.cache import Cache
from lora_init.factors import Factors, Replacement, fused, low_rank_product, unstacked
from lora_init.initialize import jobs, shared
from lora_init.initialize.cached import CachedFactors, cacheable
from lora_init.initialize.checks import (
    FactorNorms,
    check_shapes,
    moved_together,
    warn_of_concerns,
)
from lora_init.initialize.groups import group_layers, joined
from lora_init.initialize.jobs import Job
from lora_init.layer import Layer, LayerStatistics, stacked
from lora_init.linalg import draws
from lora_init.linalg.matrix import refuse_non_finite, widened
from lora_init.linalg.mixed_products import is_narrow
from lora_init.linalg.moments import GradientSketch
from lora_init.linalg.precision import wide_device
from lora_init.linalg.transfer import wait_for_writes
from lora_init.plan.plan import Plan, Target
from lora_init.progress import tracking
from lora_init.quantization import Quantizer
from lora_init.weights.kinds import known_format
from lora_init.weights.offload import factor_device
from lora_init.weights.source import BaseWeights


@dataclass(frozen=True)
class InitializedLayer:
    """A target's factors, in the adapter's dtype, and the seconds to compute them."""

    target: Target
    factors: Factors
    seconds: float

    def moved(self, device: torch.device | str) -> InitializedLayer:
        """The layer with its tensors on `device`."""
        factors, replacement = self.factors, self.factors.replacement
        if replacement is None and factors.lora_A.device == torch.device(device):
            return self
        if replacement is not None:
            replacement = replace(
                replacement,
                lora_A=replacement.lora_A.to(device),
                lora_B=replacement.lora_B.to(device),
            )
        factors = replace(
            factors,
            lora_A=factors.lora_A.to(device),
            lora_B=factors.lora_B.to(device),
            core=None if factors.core is None else factors.core.to(device),
            replacement=replacement,
        )
        return replace(self, factors=factors)


def initialize(
    weights: BaseWeights,
    plan: Plan,
    statistics: Mapping[str, LayerStatistics],
    *,
    seed: int,
    device: torch.device | None = None,
    cache: Cache | None = None,
) -> list[InitializedLayer]:
    """Run the plan's method on its targets.

    Under `torch.distributed`, the ranks split the layers if all have the same work (see
    `lora_init.initialize.shared`).

    Args:
        weights: the targets' weights; they are only read.
        plan: the method and its targets.
        statistics: calibration statistics by layer name; empty for methods that need none.
        seed: the initialization seed; each layer derives a random stream from it and its name.
        device: where the decompositions run; None means the device of each weight, or the CPU if
            that device has no float64. Weights move there stack by stack, and results move to the
            device of their module.
        cache: the cache for decompositions; None disables it.

    Returns:
        The factors of all targets, in the order of the plan.

    Raises:
        ValueError: a weight or a factor is not finite, or a factor has the wrong shape; the
            message names the target.
    """
    stored = {(target.module, target.matrix) for target in plan.targets}  # experts share one
    places = {
        (module, matrix): factor_device(weights.model.get_submodule(module), matrix)
        for module, matrix in stored
    }
    homes = {target.name: places[target.module, target.matrix] for target in plan.targets}
    worker = _Worker(weights, plan, statistics, seed, homes, cache)
    devices = {name: wide_device(device or home) for name, home in homes.items()}
    planned = jobs.jobs(plan, devices)
    with tracking(len(plan.targets), f"initializing ({plan.initializer.name})") as advance:

        def run(own: Sequence[Job]) -> list[InitializedLayer]:
            wait_for_writes([*homes.values(), *devices.values()])  # threads read the weights
            done: list[InitializedLayer] = []
            for layers in jobs.run(worker, own):
                done += layers
                advance(len(layers))
            return done

        with draws.shared_blocks():
            done = shared.shared(run, planned, plan, weights, seed)
    found = {layer.target.name: layer.moved(homes[layer.target.name]) for layer in done}
    warn_of_concerns(
        plan.initializer,
        plan.options,
        [(t.name, t.rank, found[t.name].factors.metrics) for t in plan.targets if t.groups == 1],
    )
    return [found[target.name] for target in plan.targets]


def fused_layers(plan: Plan, layers: Sequence[InitializedLayer]) -> list[InitializedLayer]:
    """Join the matrices of each fused parameter's experts, in the order of the plan's targets."""
    found = {layer.target.name: layer for layer in layers}
    joined = []
    for target in plan.targets:
        own = [found[one.name] for one in target.single()]
        if target.experts is None:
            joined += own
            continue
        factors = fused([layer.factors for layer in own])
        joined.append(InitializedLayer(target, factors, sum(layer.seconds for layer in own)))
    return joined


@dataclass(frozen=True)
class _Worker:
    """Initializes the targets of a job."""

    weights: BaseWeights
    plan: Plan
    statistics: Mapping[str, LayerStatistics]
    seed: int
    homes: Mapping[str, torch.device]  # where each target's factors belong
    cache: Cache | None

    def __call__(self, job: Job) -> list[InitializedLayer]:
        """Initialize the job; if memory runs out, in smaller parts and finally on the CPU."""
        try:
            return self._initialized(job)
        except torch.OutOfMemoryError:
            parts = job.parts()
            if not parts:
                raise
        # Not in the handler: its traceback keeps the tensors of the failed attempt.
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
        if parts[0].device != job.device:
            _warn_of_memory(job)
        return [layer for part in parts for layer in self(part)]

    def _initialized(self, job: Job) -> list[InitializedLayer]:
        start = time.perf_counter()
        layers = [self._layer(target, job.device) for target in job.targets]
        try:
            factors = self._factors(job, layers)
            norms = FactorNorms.of(factors)
            homes = [self.homes[target.name] for target in job.targets]
            settled = [
                self._settled(target, layer, one)
                for target, layer, one in zip(
                    job.targets, layers, moved_together(factors, homes), strict=True
                )
            ]
            # Only the copy of these numbers waits for the device; all work before it is queued.
            figures = norms.checked(
                job.targets, self.plan.initializer, [dict(one.metrics) for one in settled]
            )
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # The usual cause is a weight that is not finite: report that error instead.
            for target, layer in zip(job.targets, layers, strict=True):
                if layer.stored_weight is not None:
                    refuse_non_finite(target.name, layer.weight)
                if layer.target_weight is not None:
                    refuse_non_finite(f"target_weights of {target.name}", layer.target_weight)
            raise
        settled = [
            replace(one, metrics=numbers) for one, numbers in zip(settled, figures, strict=True)
        ]
        seconds = (time.perf_counter() - start) / len(job.targets)
        return [
            InitializedLayer(target, each, seconds)
            for target, each in zip(job.targets, settled, strict=True)
        ]

    def _layer(self, target: Target, device: torch.device) -> Layer:
        """The method's input for one target, on `device`."""
        weight = None
        if "weight" in self.plan.initializer.reads | self.plan.options.also_reads():
            weight = self.weights.weight(target).to(device)
            if not is_narrow(weight.dtype):
                weight = weight.to(torch.float32)
        bias = None
        if "bias" in self.plan.initializer.reads | self.plan.options.also_reads():
            bias = _bias(self.weights.model.get_submodule(target.module), target).to(device)
        statistics = self.statistics.get(target.name, LayerStatistics()).to(device)
        second = None
        if "target_weight" in self.plan.initializer.reads:
            second = self.weights.target_weight(target).to(device)
        gradient = statistics.gradient
        if isinstance(gradient, GradientSketch):
            gradient = gradient.dense()
        quantizer = None
        if target.quantized:
            module = self.weights.model.get_submodule(target.module)
            quantizer = known_format(module).quantizer(module)
        return Layer(
            names=(target.name,),
            kind=target.module_type,
            shape=target.shape,
            rank=target.rank,
            scaling=target.scaling,
            seed=self.seed,
            stored_weight=weight,
            bias=bias,
            inputs=statistics.inputs,
            gradient=gradient,
            output_moments=statistics.output_moments,
            quantizer=quantizer,
            target_weight=second,
            planned_rank=target.planned_rank,
        )

    def _factors(self, job: Job, layers: list[Layer]) -> list[Factors]:
        """Load the factors of a job from the cache, or compute them."""
        cache = self.cache
        grouped = any(target.groups > 1 for target in job.targets)
        if cache is None or grouped or not cacheable(cache, self.plan.initializer, job.targets):
            return self._computed(job.targets, layers)
        memory = CachedFactors(cache, self.plan, job.device)
        keys = [memory.key(layer) for layer in layers]
        entries = [memory.get(key, layer) for key, layer in zip(keys, layers, strict=True)]
        found = {index: factors for index, factors in enumerate(entries) if factors is not None}
        missing = [index for index in range(len(layers)) if index not in found]
        if missing:
            made = self._computed(
                tuple(job.targets[index] for index in missing), [layers[index] for index in missing]
            )
            for index, factors in zip(missing, made, strict=True):
                found[index] = factors
                memory.put(keys[index], layers[index], factors)
        return [found[index] for index in range(len(layers))]

    def _computed(self, targets: tuple[Target, ...], layers: list[Layer]) -> list[Factors]:
        """Call the method: on one layer, on a stack, or on the layers of a stack in turn."""
        if (count := targets[0].groups) > 1:  # alike for all targets of a job
            made = [self._of_groups(group_layers(layer, count)) for layer in layers]
        else:
            made = self._made(layers)
        for target, factors in zip(targets, made, strict=True):
            check_shapes(target.name, target.shape, target.rank, self.plan.initializer, factors)
        return made

    def _of_groups(self, groups: list[Layer]) -> Factors:
        """The factors of one grouped convolution."""
        made = self._made(groups)
        figures = [
            (each.names[0], each.rank, one.metrics) for each, one in zip(groups, made, strict=True)
        ]
        warn_of_concerns(self.plan.initializer, self.plan.options, figures)  # `joined` drops them
        return joined(made)

    def _made(self, layers: list[Layer]) -> list[Factors]:
        """The factors of layers of one shape, rank, scaling and type."""
        spec, options = self.plan.initializer, self.plan.options
        if len(layers) == 1 or not spec.is_batched:
            return [spec.factors(layer, options) for layer in layers]
        return unstacked(spec.factors(stacked(layers), options), len(layers))

    def _settled(self, target: Target, given: Layer, factors: Factors) -> Factors:
        home, dtype = self.homes[target.name], self.plan.adapter_dtype
        factors = replace(
            factors,
            lora_A=_settled(factors.lora_A, home, dtype),
            lora_B=_settled(factors.lora_B, home, dtype),
            core=None if factors.core is None else _settled(factors.core, home, dtype),
            replacement=_settled_replacement(factors.replacement, home),
        )
        if given.quantizer is not None and self.plan.requantizes_base(target):
            weight = widened(self.weights.weight(target).to(home)).float()
            factors = _requantized(factors, weight, target, given.quantizer)
        return factors


def _bias(module: nn.Module, target: Target) -> Float[Tensor, " out"]:
    """The bias of a target in float32; zeros if it has none.

    Raises:
        ValueError: the bias is not loaded.
    """
    name = "bias" if target.expert is None else f"{target.matrix}_bias"
    found = getattr(module, name, None)
    if found is not None and target.expert is not None:
        found = found[target.expert]
    if not isinstance(found, Tensor):
        return torch.zeros(target.shape[0])
    if found.is_meta:
        raise ValueError(
            f"target {target.name!r}: its bias is on the meta device, and this method's options "
            "read it; load the model, or set bias=False"
        )
    return found.detach().float()


def _requantized(factors: Factors, weight: Tensor, target: Target, quantizer: Quantizer) -> Factors:
    """Add the recipe of the requantized residual to the factors, and its error to the metrics."""
    # In the stored dtype: the layer must add exactly the product that was subtracted.
    lora_A, lora_B = factors.lora_A.float(), factors.lora_B.float()
    replacement = Replacement(quantizer, lora_A, lora_B)
    norm = linalg.frobenius_norm(weight)
    before = linalg.frobenius_norm(weight - quantizer.roundtrip(weight)) / norm
    product = low_rank_product(lora_A, lora_B, target.scaling)
    error = linalg.frobenius_norm(weight - replacement.base(weight, target.scaling) - product)
    figures = {
        "error": error / norm,
        "error_without_adapter": before,
        "quantizer": quantizer.name,
    }
    return replace(factors, replacement=replacement, metrics={**factors.metrics, **figures})


def _settled(factor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    factor = factor.detach()
    if factor.device.type == "cpu" and not any(factor.stride()):  # one number in memory
        number = factor[(0,) * factor.ndim].item()
        return torch.full(factor.shape, number, dtype=dtype, device=device)
    # A contiguous copy: a view would keep the whole decomposition in memory.
    return factor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)


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


def _warn_of_memory(job: Job) -> None:
    warnings.warn(
        f"{job.device} has too little free memory to initialize one layer, so the CPU is used. "
        "Free memory there, or pass device='cpu' to initialize all layers on the CPU",
        stacklevel=2,
    )
