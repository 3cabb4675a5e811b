"""Tasks: how examples become batches, and how answers are scored.

To add one: a class with the methods of `Task` in a file here, and a branch in `make_task`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from ..config.training import TrainingConfig
from ..data import Judge, says_exactly
from .batches import SeededBatches, draw
from .causal_lm import CausalLM
from .evaluation import Evaluation, collect
from .text_classification import TextClassification

__all__ = ["Evaluation", "SeededBatches", "Task", "collect", "draw", "make_task"]


class Task(Protocol):
    """The interface of a task for training and evaluation.

    Attributes:
        metric: the name of the score, the mean of the rows' `correct`.
    """

    metric: str

    def collate(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        """One padded batch with labels: the keyword arguments of the model."""

    def counted(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The number of tokens or texts over which the model's loss on a batch is a mean."""

    def rows(
        self,
        model: torch.nn.Module,
        examples: Sequence[Any],
        batch_size: int,
        device: torch.device,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[dict[str, Any]]:
        """One row per example (see `evaluation.collect`), for part k of n of the batches."""

    def probed(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """A mask of the logits that count, or None for all."""

    def majority(self, examples: Sequence[Any]) -> float | None:
        """The score of the best constant answer, or None if there is no such answer."""


def make_task(
    task_type: str, tokenizer: Any, settings: TrainingConfig, judge: Judge = says_exactly
) -> Task:
    """The task of a kind of data, "SEQ_CLS" or "CAUSAL_LM"; `judge` is for generated texts."""
    if task_type == "SEQ_CLS":
        return TextClassification(tokenizer, settings.max_length)
    return CausalLM(
        tokenizer, settings.max_length, settings.generate_limit, settings.max_new_tokens, judge
    )
