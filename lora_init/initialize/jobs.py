"""Which layers are initialized together, and how they keep all cores or the accelerator busy.

On an accelerator, layers of one shape are a stack: one call for many of them, as wide as
`STACK_BYTES` allows. On a CPU a stack would wait for its slowest LAPACK call: there layers share
out the cores (see `lora_init.linalg.cores`), by the size of what is worked on: the weight, or, of
methods that only draw, the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

import torch

from lora_init.linalg.cores import STACK_BYTES, over_cores
from lora_init.plan.plan import Plan, Target

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """Targets of one shape, rank, scaling and type that are initialized by one call."""

    targets: tuple[Target, ...]
    device: torch.device
    numbers: int | None = None  # how large each one's work is; None: it is no matter of a CPU's

    def parts(self) -> tuple[Job, ...]:
        """Jobs that need less memory: half a stack each, or one layer on the CPU, or none."""
        half = len(self.targets) // 2
        if half:
            return replace(self, targets=self.targets[:half]), replace(
                self, targets=self.targets[half:]
            )
        if self.device.type == "cpu":
            return ()
        return (replace(self, device=torch.device("cpu")),)


def jobs(plan: Plan, devices: dict[str, torch.device]) -> list[Job]:
    """All targets, in jobs; `devices` says where each is computed."""
    made: list[Job] = []
    waiting: dict[tuple, list[Target]] = {}
    for target in plan.targets:
        device = devices[target.name]
        if device.type == "cpu" or not stackable(plan, target):
            numbers = _numbers(target, plan) if device.type == "cpu" else None
            made.append(Job((target,), device, numbers))
            continue
        alike = target.shape, target.rank, target.scaling, target.module_type, device
        stack = waiting.setdefault(alike, [])
        stack.append(target)
        if 4 * _stacked_numbers(target, plan) * (len(stack) + 1) > STACK_BYTES:
            made.append(Job(tuple(waiting.pop(alike)), device))
    made += [Job(tuple(stack), alike[-1]) for alike, stack in waiting.items()]
    return made


def _stacked_numbers(target: Target, plan: Plan) -> int:
    """Of the weight, or of its inputs' second moment where a method reads that."""
    moment = target.shape[1] ** 2 if "inputs" in plan.initializer.reads else 0
    return max(prod(target.shape), moment)


def stackable(plan: Plan, target: Target) -> bool:
    """Whether the target may be initialized with others of its shape.

    Factors that are only drawn are made one by one, and then moved together.
    """
    if plan.initializer.reads:
        return plan.initializer.is_batched and not target.quantized
    return not plan.requantizes_base(target)


def run(work: Callable[[Job], Result], planned: Sequence[Job]) -> Iterator[Result]:
    """The results, in no particular order; an error ends the rest."""
    return over_cores(work, planned, lambda job: job.numbers)


def _numbers(target: Target, plan: Plan) -> int:
    """How many one layer's work is on; more threads than they keep busy wait for each other."""
    drawn = not plan.initializer.reads and not plan.requantizes_base(target)
    return target.rank * sum(target.shape) if drawn else prod(target.shape)
