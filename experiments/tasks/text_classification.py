"""Text classification: one label per text, scored by accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..data import Labelled
from .batches import by_length


class TextClassification:
    """Tokenize, pad to the longest text of the batch, and compare the logits with the label."""

    metric = "accuracy"

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def collate(self, examples: Sequence[Labelled]) -> dict[str, torch.Tensor]:
        """A padded batch: input_ids and attention_mask (batch, length), labels (batch,)."""
        batch = self.tokenizer(
            [example.text for example in examples],
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
        )
        return {**batch, "labels": torch.tensor([example.label for example in examples])}

    def rows(
        self,
        model: torch.nn.Module,
        examples: Sequence[Labelled],
        batch_size: int,
        device: torch.device,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[dict[str, Any]]:
        """One row per example; `loss` is the negative log-probability of its label."""
        for indices in by_length([len(e.text) for e in examples], batch_size, part):
            chosen = [examples[index] for index in indices]
            batch = {key: value.to(device) for key, value in self.collate(chosen).items()}
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            losses = F.cross_entropy(logits, labels, reduction="none").tolist()
            right = (logits.argmax(-1) == labels).tolist()
            for example, hit, loss in zip(chosen, right, losses, strict=True):
                yield {
                    "id": example.id, "correct": hit, "score": -loss, "loss": loss, "weight": 1,
                }  # fmt: skip

    def counted(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The number of texts over which the model's loss on a batch is a mean: a scalar."""
        return torch.tensor(len(batch["labels"]), device=batch["labels"].device)

    def probed(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """None: all logits count."""
        return None

    def majority(self, examples: Sequence[Labelled]) -> float:
        """The accuracy of always choosing the most frequent label of these examples."""
        counts = np.bincount([example.label for example in examples])
        return float(counts.max() / len(examples))
