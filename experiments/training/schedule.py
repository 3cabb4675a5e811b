"""How long, how fast and how precisely to train: the settings, and the learning rate by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from experiments.config.bounds import check_choice, check_integer, check_number, check_switches

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}
FASTEST = 1e36
"""Learning rates stay so far below the largest float32 that the optimizer's products fit too."""
PRECISIONS = ("no", "bf16", "fp16")


def steps_of(epochs: float, examples: int, batch_size: int) -> int:
    """The fewest steps that see `examples` examples `epochs` times.

    For configurations: `steps: ${steps_of:3,${data.train_limit},${training.batch_size}}`. The
    number is known before anything is loaded, and belongs to the run's identity.

    Raises:
        ConfigurationError: a number out of range.
    """
    check_number("steps_of: epochs", epochs, above=0)
    check_integer("steps_of: examples", examples, 1)
    check_integer("steps_of: batch size", batch_size, 1)
    return max(1, math.ceil(epochs * examples / batch_size))


@dataclass
class TrainingConfig:
    """How long and how fast to train, and how to evaluate.

    Attributes:
        steps, batch_size: optimizer steps, and examples a step over all processes.
        learning_rate: of the adapters, at its peak.
        lora_plus_ratio: the rate of the factors B is so many times that of A, which is
            `learning_rate`; 1: the same. Hayou et al. 2024, "LoRA+", arXiv 2402.12354.
        head_learning_rate: of everything else that is trained (a new head); None: the same.
        warmup: the share of steps over which the rate rises from zero.
        schedule: what follows: linear, cosine or constant.
        max_grad_norm: clip the gradient's norm; None leaves it.
        mixed_precision: no, bf16 or fp16.
        max_length: tokens of an example, longer ones are cut.
        validate_every: evaluate on the validation split every so many steps; 0: no.
        validate_at_start: and before the first step.
        validate_at_end: and after the last, if there is a validation split.
        generate_limit, max_new_tokens: causal only: answers generated a split, and their length.
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
        check_number("training.learning_rate", self.learning_rate, above=0, below=FASTEST)
        check_number(
            "training.lora_plus_ratio", self.lora_plus_ratio, above=0,
            below=FASTEST / self.learning_rate, fix="1: A and B alike",
        )  # fmt: skip
        check_number(
            "training.head_learning_rate", self.head_learning_rate, above=0, below=FASTEST,
            null="the same as training.learning_rate",
        )  # fmt: skip
        check_number("training.weight_decay", self.weight_decay, least=0)
        check_number("training.warmup", self.warmup, least=0, below=1)
        check_number(
            "training.max_grad_norm", self.max_grad_norm, above=0, null="gradients are not clipped"
        )
        check_choice("training.schedule", self.schedule, SCHEDULES)
        check_choice("training.mixed_precision", self.mixed_precision, PRECISIONS)
        switches = ("validate_at_start", "validate_at_end", "save_adapter")
        check_switches("training.", self, *switches)


def learning_rate_factor(step: int, settings: TrainingConfig) -> float:
    """What the peak rate is multiplied by at `step`, counted from 0; never 0 itself."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[settings.schedule]((step - warmup) / max(settings.steps - warmup, 1))
