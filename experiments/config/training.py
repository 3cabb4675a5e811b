"""The settings of training and evaluation, and the budgets that limit them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .bounds import check_choice, check_integer, check_number, check_switches

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}
HIGHEST_RATE = 1e36
"""The optimizer multiplies learning rates, and the products must fit into float32."""
PRECISIONS = ("no", "bf16", "fp16")


def steps_of(epochs: float, examples: int, batch_size: int) -> int:
    """The fewest steps that see `examples` examples `epochs` times.

    A resolver for YAML: `steps: ${steps_of:3,${data.train_limit},${training.batch_size}}`. The
    number is known before anything is loaded, so it is part of the run's identity.

    Raises:
        ConfigurationError: a number is out of range.
    """
    check_number("steps_of: epochs", epochs, above=0)
    check_integer("steps_of: examples", examples, 1)
    check_integer("steps_of: batch size", batch_size, 1)
    return max(1, math.ceil(epochs * examples / batch_size))


@dataclass
class TrainingConfig:
    """How long and how fast to train, and how to evaluate.

    Attributes:
        steps, batch_size: optimizer steps, and examples per step over all processes.
        learning_rate: the peak rate of the adapters.
        lora_plus_ratio: the rate of the factors B divided by the rate of A, which is
            `learning_rate`. Hayou et al. 2024, "LoRA+", arXiv 2402.12354.
        head_learning_rate: the rate of everything else that is trained (a new head); None uses
            `learning_rate`.
        warmup: the share of steps over which the rate rises from zero.
        schedule: linear, cosine or constant, after the warm-up.
        max_grad_norm: clip the gradient's norm to this; None does not clip.
        mixed_precision: no, bf16 or fp16.
        max_length: tokens per example; longer ones are cut.
        validate_every: evaluate on the validation split every so many steps; 0 never does.
        validate_at_start: evaluate before the first step, too.
        validate_at_end: evaluate after the last step, if there is a validation split.
        generate_limit, max_new_tokens: for language models: how many answers to generate per
            split, and their length.
        save_adapter: write the trained adapter into the run's folder.
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 1e-3
    lora_plus_ratio: float = 1.0
    head_learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    schedule: str = "linear"
    max_grad_norm: float | None = 1.0
    mixed_precision: str = "no"
    max_length: int = 64
    eval_batch_size: int = 64
    validate_every: int = 0
    validate_at_start: bool = False
    validate_at_end: bool = True
    generate_limit: int = 32
    max_new_tokens: int = 8
    save_adapter: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_length", "eval_batch_size", "max_new_tokens"):
            check_integer(f"training.{name}", getattr(self, name), 1)
        for name in ("validate_every", "generate_limit"):
            check_integer(f"training.{name}", getattr(self, name), 0, fix="0 means none")
        check_number("training.learning_rate", self.learning_rate, above=0, below=HIGHEST_RATE)
        check_number(
            "training.lora_plus_ratio", self.lora_plus_ratio, above=0,
            below=HIGHEST_RATE / self.learning_rate, fix="1 trains A and B at the same rate",
        )  # fmt: skip
        check_number(
            "training.head_learning_rate", self.head_learning_rate, above=0, below=HIGHEST_RATE,
            null="the same as training.learning_rate",
        )  # fmt: skip
        check_number("training.weight_decay", self.weight_decay, least=0)
        check_number("training.warmup", self.warmup, least=0, below=1)
        null = "gradients are not clipped"
        check_number("training.max_grad_norm", self.max_grad_norm, above=0, null=null)
        check_choice("training.schedule", self.schedule, SCHEDULES)
        check_choice("training.mixed_precision", self.mixed_precision, PRECISIONS)
        switches = ("validate_at_start", "validate_at_end", "save_adapter")
        check_switches("training.", self, *switches)


@dataclass
class BudgetConfig:
    """What a run may spend; None sets no limit.

    The batches of a seed are the same for every method, so equal steps are equal tokens.
    `tokens` is for comparisons that change the tokens per step: batch size, length, tokenizer.

    Attributes:
        tokens: train for the fewest steps that see this many tokens, without padding.
            `training.steps` is the upper limit. The learning rate's schedule ends with these steps.
        trainable_parameters: the size of the adapters without heads. Each method must have this
            many, up to one rank of its largest layer.
    """

    tokens: int | None = None
    trainable_parameters: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "trainable_parameters"):
            check_integer(f"budget.{name}", getattr(self, name), 1, null="no budget")
