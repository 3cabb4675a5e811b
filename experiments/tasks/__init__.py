"""Tasks: how examples become batches, and how answers are scored.

To add one: a class with the methods of `Task` in a file here, and a branch in `make_task`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from experiments.config.training import TrainingConfig
from experiments.data import Judge, says_exactly
from experiments.tasks.batches import SeededBatches, draw
from experiments.tasks.causal_lm import CausalLM
from experiments.tasks.evaluation import Evaluation, collect
from experiments.tasks.text_classification import TextClassification

__all__ = ["Evaluation", "SeededBatches", "Task", "collect", "draw", "make_task"]


class Task(Protocol):
    """What training and evaluation need to know of a task.

    Attributes:
        metric: the name of the score, the mean of the rows' `correct`.
    """

    metric: str

    def collate(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Examples as one padded batch with labels: the keyword arguments of the model."""

    def counted(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """How many things (tokens, texts) the model's loss on a batch is the mean of."""

    def rows(
        self,
        model: torch.nn.Module,
        examples: Sequence[Any],
        batch_size: int,
        device: torch.device,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[dict[str, Any]]:
        """One row an example (see `evaluation.collect`), for part k of n of the batches."""

    def probed(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """A mask of the logits that mean something, or None for all."""

    def majority(self, examples: Sequence[Any]) -> float | None:
        """The score of the constant answer that suits most examples, where there is one."""


def make_task(
    task_type: str, tokenizer: Any, settings: TrainingConfig, judge: Judge = says_exactly
) -> Task:
    """The task of a kind of data, "SEQ_CLS" or "CAUSAL_LM"; `judge` is for generated texts."""
    if task_type == "SEQ_CLS":
        return TextClassification(tokenizer, settings.max_length)
    return CausalLM(
        tokenizer, settings.max_length, settings.generate_limit, settings.max_new_tokens, judge
    )
