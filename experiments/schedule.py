"""How long, how fast and how precisely to train: the settings, and the learning rate by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}
PRECISIONS = ("no", "bf16", "fp16")


def steps_of(epochs: float, examples: int, batch_size: int) -> int:
    """The fewest steps that see `examples` examples `epochs` times.

    For configurations: `steps: ${steps_of:3,${data.train_limit},${training.batch_size}}`. The
    number is known before anything is loaded, and belongs to the run's identity.
    """
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
            if getattr(self, name) < 1:
                raise ValueError(
                    f"training.{name}={getattr(self, name)}; allowed are integers >= 1"
                )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(
                f"training.learning_rate={self.learning_rate}; allowed are finite numbers > 0"
            )
        if not (math.isfinite(self.lora_plus_ratio) and self.lora_plus_ratio > 0):
            raise ValueError(
                f"training.lora_plus_ratio={self.lora_plus_ratio}; allowed are finite numbers > 0 "
                "(1: A and B at the same rate)"
            )
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"training.warmup={self.warmup}; allowed are shares 0.0 <= x < 1.0")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"training.schedule={self.schedule!r}; allowed are {', '.join(SCHEDULES)}"
            )
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(
                f"training.mixed_precision={self.mixed_precision!r}; allowed are "
                f"{', '.join(PRECISIONS)}"
            )


def learning_rate_factor(step: int, settings: TrainingConfig) -> float:
    """What the peak rate is multiplied by at `step`, counted from 0; never 0 itself."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[settings.schedule]((step - warmup) / max(settings.steps - warmup, 1))
