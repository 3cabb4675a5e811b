"""Distributed initialization: ranks of a process group split the layers and exchange the results.

This requires the same work on all ranks: the same method on the same targets, weights and seed.
Otherwise each rank computes all its layers. Examples are a sharded model, a model from another
checkpoint, and methods that are too cheap to share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_init.cache import key
from lora_init.distributed import all_or_none, from_ranks, rank_count, rank_number
from lora_init.initialize.jobs import Job
from lora_init.plan.plan import Plan
from lora_init.weights.fingerprint import fingerprint
from lora_init.weights.source import BaseWeights

if TYPE_CHECKING:
    from lora_init.initialize.run import InitializedLayer

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Run = Callable[[Sequence[Job]], "list[InitializedLayer]"]


def shared(
    run: Run, jobs: Sequence[Job], plan: Plan, weights: BaseWeights, seed: int
) -> list[InitializedLayer]:
    """Initialize all layers, here or split over all ranks; the latter returns them on the CPU.

    Raises:
        RuntimeError: another rank failed; the message contains its error.
    """
    if rank_count() == 1 or not _is_alike(plan, weights, seed):
        return run(jobs)
    with all_or_none("initialization"):
        own = run(_share(jobs))
    everything = from_ranks([layer.moved("cpu") for layer in own])
    return [layer for part in everything for layer in part]


def _is_alike(plan: Plan, weights: BaseWeights, seed: int) -> bool:
    """Whether all ranks would compute the same; every rank gets the same answer."""
    reads = bool(plan.initializer.reads)
    mine = key(
        plan.initializer.name,
        1,
        [seed, str(plan.adapter_dtype), plan.quantized_base, plan.options],
        [
            [target, _identity(weights.weight(target)) if weights.is_readable(target) else None]
            for target in plan.targets
            if reads
        ],
    )
    others = from_ranks((reads, mine))
    return reads and all(other == (True, mine) for other in others)


def _identity(weight: Tensor) -> list[str | int]:
    """A cheap fingerprint: samples of the weight, and the exact sum of its bits as integers."""
    bits = weight.view(INTEGERS[weight.element_size()])
    return [fingerprint(weight), int(bits.sum(dtype=torch.int64))]


def _share(jobs: Sequence[Job]) -> list[Job]:
    """This rank's jobs: the next largest job goes to the rank with the least work so far."""
    loads = [0] * rank_count()
    own = []
    for job in sorted(jobs, key=lambda job: -_size(job)):
        lightest = loads.index(min(loads))
        loads[lightest] += _size(job)
        if lightest == rank_number():
            own.append(job)
    return own


def _size(job: Job) -> int:
    return sum(prod(target.shape) for target in job.targets)
