"""Short fine-tunings on blocks of tokens, with the training loop of the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..config.training import TrainingConfig
from ..console import training_bar
from ..training.loop import make_accelerator, train
from .corpus import language_batches


class Blocks:
    """Language modeling on blocks of tokens, all of one length."""

    def collate(self, examples: Sequence[Int[Tensor, " length"]]) -> dict[str, Tensor]:
        return language_batches(torch.stack(list(examples)), len(examples))[0]


@dataclass(frozen=True)
class Trace:
    """The losses of a fine-tuning and its gradient norms before clipping, by step."""

    losses: list[float]
    gradient_norms: list[float]

    def steps(self) -> list[tuple[int, float, float]]:
        """Number, loss and gradient norm of every step, from 1 on."""
        numbers = range(1, len(self.losses) + 1)
        return list(zip(numbers, self.losses, self.gradient_norms, strict=True))


def constant_training(
    options: Any, rate: float, max_grad_norm: float | None = None
) -> TrainingConfig:
    """Training at a constant rate, from options with steps and batch_size."""
    return TrainingConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=rate,
        schedule="constant",
        warmup=0.0,
        max_grad_norm=max_grad_norm,
    )


def fine_tune(
    model: torch.nn.Module,
    blocks: Int[Tensor, "blocks length"],
    settings: TrainingConfig,
    *,
    seed: int,
    device: str = "auto",
    observe: Callable[[int], None] = lambda step: None,
) -> Trace:
    """Train `model` in place by `experiments.training.loop.train`.

    Args:
        seed: of the order of the blocks; compared trainings need the same.
        observe: called after every step with the number of finished steps.

    Raises:
        RunFailed: the loss is not finite.
    """
    rows: list[dict[str, Any]] = []
    with training_bar(settings.steps, True) as advance:
        train(
            model,
            Blocks(),
            list(blocks),
            settings,
            seed=seed,
            accelerator=make_accelerator(settings, device),
            record=rows.append,
            observe=observe,
            advance=advance,
        )
    return Trace([row["loss"] for row in rows], [row["grad_norm"] for row in rows])
