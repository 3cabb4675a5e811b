"""Budgets that make runs comparable: equal trainable parameters, equal tokens, equal steps.

Equal steps are `training.steps`, and the batches of a seed are the same for every method: equal
steps then are equal tokens. `budget.tokens` is for comparisons over settings that change how many
tokens a step sees (batch size, length, another model's tokenizer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.bounds import check_integer
from experiments.errors import ConfigurationError
from experiments.schedule import TrainingConfig
from experiments.tasks import SeededBatches, Task
from lora_init.plan.plan import Plan


@dataclass
class BudgetConfig:
    """What a run may spend; None leaves it open.

    Attributes:
        tokens: train for the fewest steps that see so many tokens (padding does not count);
            `training.steps` is the most they may be. The learning rate's schedule is stretched over
            these steps: one cut off before its end would compare runs that have not settled.
        trainable_parameters: of the adapters (heads not counted). Each method's must be as many, to
            less than one rank of its largest layer.
    """

    tokens: int | None = None
    trainable_parameters: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "trainable_parameters"):
            check_integer(f"budget.{name}", getattr(self, name), 1, null="no budget")


def limit_steps(
    settings: TrainingConfig, budget: BudgetConfig, task: Task, examples: Sequence[Any], seed: int
) -> TrainingConfig:
    """The settings with the steps that `budget.tokens` asks for.

    The batches are known beforehand: their tokens are counted, and nothing is trained.

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
        f"budget.tokens={budget.tokens}, and training.steps={settings.steps} steps see {seen}; "
        f"raise training.steps (about {needed} are needed), or lower budget.tokens"
    )


def check_parameters(plan: Plan, budget: BudgetConfig, *, rank: int, allocated: bool) -> None:
    """Refuse adapters that are larger or smaller than `budget.trainable_parameters`.

    Args:
        plan: before initialization, or after it, when ranks may have been allocated anew.
        rank: the configuration's `lora.r`.
        allocated: whether the plan's ranks are an allocation's.

    Raises:
        ConfigurationError: by one rank of the largest layer or more.
    """
    wanted = budget.trainable_parameters
    if wanted is None:
        return
    largest = max(rank_size(plan, *target.shape) for target in plan.targets)
    if abs(plan.parameters - wanted) < largest:
        return
    method = plan.initializer.name
    has = (
        f"budget.trainable_parameters={wanted}, and the adapters of init={method} have "
        f"{plan.parameters}"
    )
    if allocated:
        if hasattr(plan.options, "budget"):
            fix = "set init.budget=parameters, or raise init.rho if its layers can grow no further"
        else:
            fix = "set its bounds such that every layer keeps lora.r, or another lora.r"
        raise ConfigurationError(
            f"{has} after its ranks were allocated anew (allowed is a difference of less than "
            f"{largest}, one rank of the largest layer); {fix}"
        )
    raise ConfigurationError(
        f"{has} at lora.r={rank} (allowed is a difference of less than {largest}, one rank of the "
        f"largest layer); {fitting_rank(plan, wanted, largest)}"
    )


def fitting_rank(plan: Plan, wanted: int, tolerance: int) -> str:
    """What to set: the rank whose adapters have the wanted size, or the nearest sizes there are."""
    if len({target.rank for target in plan.targets}) > 1:
        return "change lora.r or lora.rank_pattern"
    each = sum(rank_size(plan, *target.shape) for target in plan.targets)
    fixed = plan.parameters - plan.targets[0].rank * each  # DoRA's magnitudes and LoRA's biases
    below = max(1, (wanted - fixed) // each)
    sizes = {rank: fixed + rank * each for rank in (below, below + 1)}
    nearest = min(sizes, key=lambda rank: abs(sizes[rank] - wanted))
    if abs(sizes[nearest] - wanted) < tolerance:
        return f"set lora.r={nearest}"
    offers = " or ".join(
        f"lora.r={rank} with budget.trainable_parameters={size}" for rank, size in sizes.items()
    )
    return f"no rank fits: set {offers}"


def rank_size(plan: Plan, rows: int, columns: int) -> int:
    """Trainable numbers of one rank of a layer."""
    frozen = plan.initializer.frozen
    return ("lora_A" not in frozen) * columns + ("lora_B" not in frozen) * rows
