"""The ranks of a process group share the layers out between them, and exchange the results.

Only where all have the same to do: the same method on the same targets, weights and seed. A model
that is cut into pieces, a model of another checkpoint, or a method too cheap to share is computed
by each rank for itself.
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
    """All layers: computed here, or by this rank and the others, from whom they come on the CPU.

    Raises:
        RuntimeError: another rank failed; the message is its own.
    """
    if rank_count() == 1 or not _is_alike(plan, weights, seed):
        return run(jobs)
    with all_or_none("initialization"):
        own = run(_share(jobs))
    everything = from_ranks([layer.moved("cpu") for layer in own])
    return [layer for part in everything for layer in part]


def _is_alike(plan: Plan, weights: BaseWeights, seed: int) -> bool:
    """Whether every rank would compute the same; all ranks come to the same answer."""
    reads = bool(plan.initializer.reads)
    mine = key(
        plan.initializer.name,
        1,
        [seed, str(plan.adapter_dtype), plan.quantized_base, plan.options],
        [[target, _identity(weights.weight(target)) if reads else None] for target in plan.targets],
    )
    others = from_ranks((reads, mine))
    return reads and all(other == (True, mine) for other in others)


def _identity(weight: Tensor) -> list[str | int]:
    """Samples of a weight, and the sum of all its bits as integers: exact in any order, one reading
    of the memory, where a cryptographic hash takes ten times as long.
    """
    bits = weight.view(INTEGERS[weight.element_size()])
    return [fingerprint(weight), int(bits.sum(dtype=torch.int64))]


def _share(jobs: Sequence[Job]) -> list[Job]:
    """This rank's part: the next largest job goes to whoever has the least work so far."""
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
