"""Distributed initialization: ranks of a process group split the layers and exchange the results.

This requires the same work on all ranks: the same method on the same targets, weights and seed.
Otherwise each rank computes all its layers. Examples are a model from another checkpoint, and
methods that are too cheap to share.

Sharded weights are gathered in rounds of one layer per rank: each rank receives the layer that it
computes, sends its parts of the others, and frees its layer before the next round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from lora_init.cache import key
from lora_init.distributed import all_or_none, from_ranks, rank_count, rank_number
from lora_init.initialize.jobs import Job
from lora_init.plan.plan import Plan, Target
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
    read = [target for target in plan.targets if plan.reads_weight(target)]
    stored = {(target.module, target.matrix): target for target in read}  # experts share one
    parts = {key for key, target in stored.items() if weights.is_sharded(target)}
    sharded = [target for target in read if (target.module, target.matrix) in parts]
    if rank_count() == 1 and not sharded:
        return run(jobs)
    alike = _is_alike(plan, weights, seed)
    if sharded:
        own = _in_rounds(run, jobs, weights, alike=alike)
    elif alike:
        with all_or_none("initialization"):
            own = run(_share(jobs))
    if not alike:
        return own if sharded else run(jobs)
    everything = from_ranks([layer.moved("cpu") for layer in own])
    return [layer for part in everything for layer in part]


def _in_rounds(
    run: Run, jobs: Sequence[Job], weights: BaseWeights, *, alike: bool
) -> list[InitializedLayer]:
    """Compute this rank's jobs, one a round, with all ranks gathering the weights of each round.

    A rank that fails still takes part in the remaining rounds, since the others would wait for it.
    """
    count, number = (rank_count(), rank_number()) if alike else (1, 0)
    ordered = sorted(jobs, key=lambda job: -_size(job))  # layers of equal work in a round
    done: list[InitializedLayer] = []
    failure = None
    for start in range(0, len(ordered), count):
        turn = ordered[start : start + count]
        for index, job in enumerate(turn):
            for target in filter(weights.is_sharded, job.targets):
                try:
                    weights.gather(target, index if alike else None)
                except Exception as error:
                    failure = failure or error
        if number < len(turn) and failure is None:
            try:
                done += run([turn[number]])
            except Exception as error:
                failure = error
        weights.free()
    with all_or_none("initialization"):
        if failure is not None:
            raise failure
    weights.share_fingerprints()
    return done


def _is_alike(plan: Plan, weights: BaseWeights, seed: int) -> bool:
    """Whether all ranks would compute the same; every rank gets the same answer."""
    reads = bool(plan.initializer.reads)
    mine = key(
        plan.initializer.name,
        1,
        [seed, str(plan.adapter_dtype), plan.quantized_base, plan.options],
        [
            [target, _identity(weights, target) if weights.is_readable(target) else None]
            for target in plan.targets
            if reads
        ],
    )
    everywhere = all(weights.is_everywhere(t) for t in plan.targets if weights.is_sharded(t))
    shares = reads and everywhere
    others = from_ranks((shares, mine))
    return shares and all(other == (True, mine) for other in others)


def _identity(weights: BaseWeights, target: Target) -> list[str | int]:
    """A cheap fingerprint: samples of the weight, and the exact sum of its bits as integers.

    A sharded weight has none: it is the same one on all ranks that hold a part of it.
    """
    if weights.is_sharded(target):
        return []
    weight = weights.weight(target)
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
