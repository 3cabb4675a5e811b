"""Budgets that make runs comparable: equal tokens and equal trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_init.plan.plan import Plan

from ..config.training import BudgetConfig, TrainingConfig
from ..errors import ConfigurationError
from ..tasks import SeededBatches, Task


def limit_steps(
    settings: TrainingConfig, budget: BudgetConfig, task: Task, examples: Sequence[Any], seed: int
) -> TrainingConfig:
    """The settings with the fewest steps that see `budget.tokens` tokens.

    The batches are known in advance, so their tokens are counted without training.

    Raises:
        ConfigurationError: `training.steps` batches have fewer tokens.
    """
    if budget.tokens is None:
        return settings
    seen = 0
    batches = SeededBatches(len(examples), settings.batch_size, settings.steps, seed)
    for step, indices in enumerate(batches, start=1):
        batch = task.collate([examples[index] for index in indices])
        seen += int(batch["attention_mask"].sum())
        if seen >= budget.tokens:
            return replace(settings, steps=step)
    needed = math.ceil(settings.steps * budget.tokens / seen)
    raise ConfigurationError(
        f"budget.tokens={budget.tokens} is not supported: training.steps={settings.steps} steps "
        f"see {seen} tokens. Raise training.steps (to about {needed}), or lower budget.tokens."
    )


def check_parameters(plan: Plan, budget: BudgetConfig, *, rank: int, allocated: bool) -> None:
    """Refuse adapters whose size differs from `budget.trainable_parameters`.

    Args:
        plan: before initialization, or after it, when methods may have chosen other ranks.
        rank: the configuration's `lora.r`.
        allocated: whether the method has chosen the ranks.

    Raises:
        ConfigurationError: they differ by one rank of the largest layer or more.
    """
    wanted = budget.trainable_parameters
    if wanted is None:
        return
    largest = max(rank_size(plan, *target.shape) for target in plan.targets)
    if abs(plan.parameters - wanted) < largest:
        return
    if not allocated:
        when, fix = f"at lora.r={rank}", fitting_rank(plan, wanted, largest)
    elif hasattr(plan.options, "budget"):
        when = "with the ranks that the method chose"
        fix = "set init.budget=parameters, or raise init.rho if its layers can grow no further"
    else:
        when = "with the ranks that the method chose"
        fix = "set its bounds such that every layer keeps lora.r, or another lora.r"
    raise ConfigurationError(
        f"budget.trainable_parameters={wanted}, and the adapters of init={plan.initializer.name} "
        f"have {plan.parameters} {when} (the difference must be less than {largest}, one rank of "
        f"the largest layer); {fix}"
    )


def fitting_rank(plan: Plan, wanted: int, tolerance: int) -> str:
    """The fix: the rank whose adapters have the wanted size, or the nearest possible sizes."""
    if len({target.rank for target in plan.targets}) > 1:
        return "change lora.r or lora.rank_pattern"
    # DoRA's magnitudes and LoRA's biases
    fixed = plan.parameters - factor_parameters(plan, plan.targets[0].rank)
    below = 1
    while fixed + factor_parameters(plan, below + 1) <= wanted:
        below += 1
    sizes = {rank: fixed + factor_parameters(plan, rank) for rank in (below, below + 1)}
    nearest = min(sizes, key=lambda rank: abs(sizes[rank] - wanted))
    if abs(sizes[nearest] - wanted) < tolerance:
        return f"set lora.r={nearest}"
    offers = " or ".join(
        f"lora.r={rank} with budget.trainable_parameters={size}" for rank, size in sizes.items()
    )
    return f"no rank fits: set {offers}"


def factor_parameters(plan: Plan, rank: int) -> int:
    """Trainable parameters in the factors, or cores, of all layers at one rank."""
    if plan.initializer.has_core:
        return rank**2 * len(plan.targets)
    return rank * sum(rank_size(plan, *target.shape) for target in plan.targets)


def rank_size(plan: Plan, rows: int, columns: int) -> int:
    """Trainable parameters that one more rank adds to a layer."""
    if plan.initializer.has_core:
        return 2 * max(target.rank for target in plan.targets) + 1
    frozen = plan.initializer.frozen
    return ("lora_A" not in frozen) * columns + ("lora_B" not in frozen) * rows
