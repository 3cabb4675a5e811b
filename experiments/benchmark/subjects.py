"""The models, the training batches and the calibration sentences: the same for both contenders.

The text is that of the packaged film reviews, for the language model too: its cost depends on the
shape of a batch only, and its loss should be one of real words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmark.settings import BenchmarkConfig, ModelSettings
from experiments.data import Labelled, load_data
from experiments.data.rotten_tomatoes import LABELS, RottenTomatoes
from experiments.models import load_model
from experiments.models.local import LocalModel
from experiments.models.minilm import MiniLM
from experiments.models.smollm2 import SmolLM2

PACKAGED = {"minilm": MiniLM, "smollm2": SmolLM2}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A pretrained model on the chosen device, with what its batches are made from."""

    name: str
    settings: ModelSettings
    model: nn.Module
    tokenizer: Any
    device: torch.device
    seed: int

    def training_batches(self, count: int) -> list[Batch]:
        """Batches with labels, of exactly (batch_size, tokens)."""
        make = classified if self.settings.task == "SEQ_CLS" else continued
        rows = make(self.tokenizer, self.settings, count, self.seed)
        return [{key: value.to(self.device) for key, value in row.items()} for row in rows]

    def calibration_batches(self, sentences: int, batch_size: int) -> list[Batch]:
        """Padded sentences without labels."""
        texts = [review.text for review in reviews(self.seed)][:sentences]
        return [
            dict(
                self.tokenizer(
                    texts[start : start + batch_size],
                    truncation=True,
                    max_length=self.settings.tokens,
                    padding=True,
                    return_tensors="pt",
                ).to(self.device)
            )
            for start in range(0, len(texts), batch_size)
        ]


def load_subject(name: str, settings: BenchmarkConfig) -> Subject:
    """Load the model called `name` in the settings, in float32."""
    chosen = settings.models[name]
    kind = PACKAGED.get(chosen.source)
    loaded = load_model(
        kind() if kind else LocalModel(name=name, path=chosen.source),
        task_type=chosen.task,
        labels=LABELS,
        head_seed=settings.seed,
    )
    device = torch.device(settings.device)
    return Subject(name, chosen, loaded.model.to(device), loaded.tokenizer, device, settings.seed)


def reviews(seed: int) -> list[Labelled]:
    """The training sentences, in a seeded order."""
    examples = load_data(RottenTomatoes()).train
    generator = torch.Generator().manual_seed(seed)
    return [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]


def classified(tokenizer: Any, settings: ModelSettings, count: int, seed: int) -> Iterator[Batch]:
    """Sentences padded or cut to the same length, with their class."""
    endless = cycle(reviews(seed))
    for _ in range(count):
        chosen = list(islice(endless, settings.batch_size))
        batch = tokenizer(
            [review.text for review in chosen],
            truncation=True,
            max_length=settings.tokens,
            padding="max_length",
            return_tensors="pt",
        )
        yield {**batch, "labels": torch.tensor([review.label for review in chosen])}


def continued(tokenizer: Any, settings: ModelSettings, count: int, seed: int) -> Iterator[Batch]:
    """Sentences one after another, cut into rows without padding."""
    size = settings.batch_size * settings.tokens
    waiting: list[int] = []
    endless = cycle(reviews(seed))
    for _ in range(count):
        while len(waiting) < size:
            waiting += [*tokenizer(next(endless).text)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor(waiting[:size]).view(settings.batch_size, settings.tokens)
        waiting = waiting[size:]
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
