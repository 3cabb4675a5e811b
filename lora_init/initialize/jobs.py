"""Jobs: groups of layers that one call initializes, and their schedule on the device.

On an accelerator, layers of one shape form a stack, initialized by one call; `STACK_BYTES` limits
its size. On a CPU a stack would wait for its slowest LAPACK call. So layers run in parallel threads
there (see `lora_init.linalg.cores`). The number of threads depends on the size of the work: the
weight, or the factors for methods that only draw random numbers.

Small experts of one parameter form stacks on a CPU, too, because a call costs more than their
decomposition. A stack has the same members whatever else is adapted, so results do not depend on
the other targets, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

import torch

from lora_init.linalg.cores import STACK_BYTES, over_cores, stack_size
from lora_init.plan.plan import Plan, Target

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """Targets of one shape, rank, scaling, type and group count, initialized by one call.

    Attributes:
        numbers: how many numbers the work reads; None for an accelerator.
    """

    targets: tuple[Target, ...]
    device: torch.device
    numbers: int | None = None

    def parts(self) -> tuple[Job, ...]:
        """Jobs with less memory: two halves of a stack, or one layer on the CPU, or none."""
        half = len(self.targets) // 2
        if half:
            return replace(self, targets=self.targets[:half]), replace(
                self, targets=self.targets[half:]
            )
        if self.device.type == "cpu":
            return ()
        return (replace(self, device=torch.device("cpu")),)


def jobs(plan: Plan, devices: dict[str, torch.device]) -> list[Job]:
    """Group all targets into jobs; `devices` maps each target's name to its device."""
    made: list[Job] = []
    waiting: dict[tuple, list[Target]] = {}
    experts: dict[tuple[str, str], list[Target]] = {}
    for target in plan.targets:
        device = devices[target.name]
        if device.type == "cpu" and target.expert is not None and stackable(plan, target):
            experts.setdefault((target.module, target.matrix), []).append(target)
            continue
        if device.type == "cpu" or not stackable(plan, target):
            numbers = _numbers(target, plan) if device.type == "cpu" else None
            made.append(Job((target,), device, numbers))
            continue
        kind = target.module_type, target.groups
        alike = target.shape, target.rank, target.scaling, kind, device
        stack = waiting.setdefault(alike, [])
        stack.append(target)
        if 4 * _stacked_numbers(target, plan) * (len(stack) + 1) > STACK_BYTES:
            made.append(Job(tuple(waiting.pop(alike)), device))
    made += [Job(tuple(stack), alike[-1]) for alike, stack in waiting.items()]
    for alike in experts.values():
        numbers = _numbers(alike[0], plan)
        count = stack_size(_stacked_numbers(alike[0], plan))
        for start in range(0, len(alike), count):
            stack = tuple(alike[start : start + count])
            made.append(Job(stack, devices[stack[0].name], numbers * len(stack)))
    return made


def _stacked_numbers(target: Target, plan: Plan) -> int:
    """The size of the weight, or of the inputs' second moments if they are read and larger."""
    moment = target.groups * target.shape[1] ** 2 if "inputs" in plan.initializer.reads else 0
    return max(prod(target.shape), moment)


def stackable(plan: Plan, target: Target) -> bool:
    """Whether the target can be initialized in a stack.

    Random factors are drawn layer by layer and then moved together.
    """
    if plan.initializer.reads:
        return plan.initializer.is_batched and not target.quantized
    return not plan.requantizes_base(target)


def run(work: Callable[[Job], Result], planned: Sequence[Job]) -> Iterator[Result]:
    """Yield the results in any order; an error stops the remaining jobs."""
    return over_cores(work, planned, lambda job: job.numbers)


def _numbers(target: Target, plan: Plan) -> int:
    """The size of one layer's work, which limits the number of threads."""
    drawn = not plan.initializer.reads and not plan.requantizes_base(target)
    return target.rank * sum(target.shape) if drawn else prod(target.shape)
