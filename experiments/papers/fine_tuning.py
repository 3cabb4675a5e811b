"""Short fine-tunings inside a reproduction: the runs' own loop, on blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from experiments.console import training_bar
from experiments.papers.corpus import language_batches
from experiments.schedule import TrainingConfig
from experiments.training import make_accelerator, train


class Blocks:
    """A task whose examples are blocks of tokens, all of one length: language modelling."""

    def collate(self, examples: Sequence[Int[Tensor, " length"]]) -> dict[str, Tensor]:
        return language_batches(torch.stack(list(examples)), len(examples))[0]


@dataclass(frozen=True)
class Trace:
    """What a fine-tuning showed, step by step: the loss and the gradient's norm before clipping."""

    losses: list[float]
    gradient_norms: list[float]


def fine_tune(
    model: torch.nn.Module,
    blocks: Int[Tensor, "blocks length"],
    settings: TrainingConfig,
    *,
    seed: int,
    device: str = "auto",
    observe: Callable[[int], None] = lambda step: None,
) -> Trace:
    """Train `model` in place by `experiments.training.train`.

    Args:
        seed: the order of the blocks: equal for all that are compared.
        observe: called with the number of steps done, after every step.

    Raises:
        RunFailed: the loss is not finite.
    """
    rows: list[dict[str, Any]] = []
    with training_bar(settings.steps, True) as advance:
        train(
            model, Blocks(), list(blocks), settings, seed=seed,
            accelerator=make_accelerator(settings, device),
            record=rows.append, observe=observe, advance=advance,
        )  # fmt: skip
    return Trace([row["loss"] for row in rows], [row["grad_norm"] for row in rows])
