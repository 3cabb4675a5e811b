"""Plan and statistics -> factors, layer by layer. Pure: no module is changed here."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_init import linalg
from lora_init.cache import Cache, fingerprint
from lora_init.calibration.result import LayerStatistics, stacked
from lora_init.factors import Factors, Replacement, low_rank_product, unstacked
from lora_init.initialize import jobs, shared
from lora_init.initialize.cached import CachedFactors, Input, canonical, has_room, specific
from lora_init.initialize.checks import FactorNorms, check_shapes, moved_together
from lora_init.initialize.jobs import Job
from lora_init.initialize.seeding import layer_generator
from lora_init.linalg import draws
from lora_init.linalg.finite import is_finite, refuse_non_finite
from lora_init.linalg.mixed_products import is_narrow
from lora_init.linalg.streams import wait_for_writes
from lora_init.plan.plan import Plan, Target
from lora_init.progress import tracking
from lora_init.quantization import Quantizer
from lora_init.registry import Nesting
from lora_init.weights.bitsandbytes import quantizer_of
from lora_init.weights.kinds import widened
from lora_init.weights.offload import factor_device
from lora_init.weights.source import BaseWeights


@dataclass(frozen=True)
class InitializedLayer:
    """A target's factors, on its module's device and in the adapter's dtype, and their cost."""

    target: Target
    factors: Factors
    seconds: float

    def moved(self, device: torch.device | str) -> InitializedLayer:
        """The same with its tensors on another device."""
        factors, replacement = self.factors, self.factors.replacement
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
    """Run the plan's method over its targets.

    Under `torch.distributed`, the ranks share the layers out between them, where all have the same
    to do (see `lora_init.initialize.shared`).

    Args:
        weights: of the targets, only read.
        plan: what to do.
        statistics: by layer name; empty for methods that need none.
        seed: the initialization seed; each layer derives a stream of its own from it and its name.
        device: where the decompositions run; None means where each weight lives. Weights move
            there a stack at a time, results return to their module's device.
        cache: where decompositions are kept; None for none.

    Raises:
        ValueError: a weight that the method reads or a factor is not finite, or a factor has the
            wrong shape; by name. Of the other weights see `unread`.
    """
    homes = {
        target.name: factor_device(weights.model.get_submodule(target.name))
        for target in plan.targets
    }
    worker = _Worker(weights, plan, statistics, seed, homes, cache)
    devices = {name: device or home for name, home in homes.items()}
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
    return [found[target.name] for target in plan.targets]


def unread(weights: BaseWeights, plan: Plan) -> dict[str, Tensor]:
    """The weights, by target, of which the plan's method reads the shape alone: plain ones in
    memory, which nothing else would look at (see `lora_init.linalg.finite`)."""
    modules = {
        target.name: weights.model.get_submodule(target.name)
        for target in plan.targets
        if not target.quantized and not plan.reads_weight(target)
    }
    return {
        name: module.weight.detach()
        for name, module in modules.items()
        if not module.weight.is_meta
    }


@dataclass(frozen=True)
class _Worker:
    """What every job needs beside its targets."""

    weights: BaseWeights
    plan: Plan
    statistics: Mapping[str, LayerStatistics]
    seed: int
    homes: Mapping[str, torch.device]  # where each target's factors belong
    cache: Cache | None

    def __call__(self, job: Job) -> list[InitializedLayer]:
        """The job's layers. A device without enough memory gets smaller parts, then the CPU all."""
        try:
            return self._initialized(job)
        except torch.OutOfMemoryError:
            parts = job.parts()
            if not parts:
                raise
        # Outside of the handler, whose traceback keeps the failed attempt's tensors.
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
        if parts[0].device != job.device:
            _warn_of_memory(job)
        return [layer for part in parts for layer in self(part)]

    def _initialized(self, job: Job) -> list[InitializedLayer]:
        start = time.perf_counter()
        inputs = [self._input(target, job.device) for target in job.targets]
        try:
            factors = self._remembered(job, inputs)
            norms = FactorNorms.of(factors)
            homes = [self.homes[target.name] for target in job.targets]
            settled = [
                self._settled(target, each, one)
                for target, each, one in zip(
                    job.targets, inputs, moved_together(factors, homes), strict=True
                )
            ]
            # The copy of these numbers is what waits for the device; until then work is queued.
            figures = norms.checked(
                job.targets, self.plan.initializer, [dict(one.metrics) for one in settled]
            )
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # Most often a weight that is not finite: then that is the error to report.
            for target, one in zip(job.targets, inputs, strict=True):
                if not one.weight.is_meta:
                    refuse_non_finite(target.name, one.weight)
            raise
        settled = [
            replace(one, metrics=numbers) for one, numbers in zip(settled, figures, strict=True)
        ]
        seconds = (time.perf_counter() - start) / len(job.targets)
        return [
            InitializedLayer(target, each, seconds)
            for target, each in zip(job.targets, settled, strict=True)
        ]

    def _input(self, target: Target, device: torch.device) -> Input:
        """What the method gets of one layer."""
        module = self.weights.model.get_submodule(target.name)
        statistics = self.statistics.get(target.name)
        if statistics is not None:  # the inputs may have been on another device than the weight
            statistics = statistics.to(device)
        content = None
        if self.plan.reads_weight(target):
            weight = self.weights.weight(target).to(device)
            if has_room(self.cache, target, self._nesting):
                content = fingerprint(weight)
            if not (self.plan.initializer.narrow and is_narrow(weight.dtype)):
                weight = widened(weight).to(torch.float32)
        else:
            # Its shape is all that is read.
            weight = torch.empty(target.shape, dtype=torch.float32, device="meta")
        if target.quantized:
            statistics = replace(statistics or LayerStatistics(), quantizer=quantizer_of(module))
        if statistics is not None and target.planned_rank is not None:
            statistics = replace(statistics, planned_rank=target.planned_rank)
        # The factors of a method whose factors nest depend on what they are made from alone.
        seeded = self._nesting is None
        generator = layer_generator(self.seed, target.name) if seeded else layer_generator(0, "")
        return Input(weight, statistics, generator, content)

    def _remembered(self, job: Job, inputs: list[Input]) -> list[Factors]:
        """From the cache where they are there; the others are computed, and kept."""
        nesting = self._nesting
        if nesting is None:
            return self._computed(job.targets, inputs)
        wider = tuple(canonical(target, nesting) for target in job.targets)
        if all(has_room(self.cache, target, nesting) for target in job.targets):
            memory = CachedFactors(self.cache, self.plan, nesting, job.device)
            found = self._from_cache(memory, wider, inputs)
        else:
            found = self._computed(wider, inputs)
        return [
            specific(factors, target, nesting)
            for target, factors in zip(job.targets, found, strict=True)
        ]

    def _from_cache(
        self, memory: CachedFactors, targets: tuple[Target, ...], inputs: list[Input]
    ) -> list[Factors]:
        keys = [memory.key(target, each) for target, each in zip(targets, inputs, strict=True)]
        found = [memory.get(key, target) for key, target in zip(keys, targets, strict=True)]
        missing = [index for index, factors in enumerate(found) if factors is None]
        if missing:
            made = self._computed(
                tuple(targets[index] for index in missing), [inputs[index] for index in missing]
            )
            for index, factors in zip(missing, made, strict=True):
                if is_finite(factors.lora_A) and is_finite(factors.lora_B):
                    memory.put(keys[index], targets[index], factors)
                found[index] = factors
        return found

    def _computed(self, targets: tuple[Target, ...], inputs: list[Input]) -> list[Factors]:
        """The method's own work, on one layer, on a stack, or on the layers of a stack in turn."""
        first, spec = targets[0], self.plan.initializer
        function = spec.function_for(first.module_type)

        def call(weight: Tensor, statistics: LayerStatistics | None, generator: Any) -> Factors:
            given = weight, first.rank, first.scaling, statistics, self.plan.options, generator
            return function(*given)

        if len(targets) == 1 or not spec.stacks:
            made = [call(one.weight, one.statistics, one.generator) for one in inputs]
        else:
            stack = torch.stack([one.weight for one in inputs])
            statistics = stacked([one.statistics for one in inputs])
            found = call(stack, statistics, [one.generator for one in inputs])
            made = unstacked(found, len(targets))
        for target, factors in zip(targets, made, strict=True):
            check_shapes(target, spec, factors)
        return made

    def _settled(self, target: Target, given: Input, factors: Factors) -> Factors:
        home, dtype = self.homes[target.name], self.plan.adapter_dtype
        factors = replace(
            factors,
            lora_A=_settled(factors.lora_A, home, dtype),
            lora_B=_settled(factors.lora_B, home, dtype),
            replacement=_settled_replacement(factors.replacement, home),
        )
        if self.plan.requantizes_base(target):
            factors = _requantized(
                factors, given.weight.to(home), target, given.statistics.quantizer
            )
        return factors

    @property
    def _nesting(self) -> Nesting | None:
        return self.plan.initializer.nesting(self.plan.options)


def _requantized(factors: Factors, weight: Tensor, target: Target, quantizer: Quantizer) -> Factors:
    """A subtracting method's factors on a base that takes the residual, and what that costs."""
    # As they are stored: what is added back must be what was subtracted.
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
    # A contiguous tensor of its own: a view would keep the whole decomposition in memory.
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
        f"{job.device} has too little free memory to initialize one layer, so the CPU does it. "
        "Free memory there, or pass device='cpu' to initialize all layers on the CPU",
        stacklevel=2,
    )

