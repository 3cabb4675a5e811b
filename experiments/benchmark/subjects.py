"""The models and their batches: the same for both contenders.

The text is that of the packaged film reviews, for the language model too: its cost depends on the
shape of a batch only, and its loss should be one of real words. Synthetic models get drawn tokens,
a single layer rows whose second moment has a power-law spectrum of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmark.powerlaw import PowerLaw, cosine_transform
from experiments.benchmark.settings import BenchmarkConfig, ModelSettings
from experiments.benchmark.synthetic import llama, single_layer
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
    """A model on the chosen device, with what its batches are made from.

    Attributes:
        known: what the synthetic weights are, by layer.
        names: the layers to adapt, where "all-linear" is no answer.
    """

    name: str
    settings: ModelSettings
    model: nn.Module
    tokenizer: Any
    device: torch.device
    seed: int
    known: Mapping[str, PowerLaw] = field(default_factory=dict)
    names: tuple[str, ...] | None = None

    @property
    def task(self) -> str | None:
        return None if self.settings.layer is not None else self.settings.task

    def training_batches(self, count: int) -> list[Batch]:
        """Batches with labels, of exactly (batch_size, tokens)."""
        shape = self.settings.batch_size, self.settings.tokens
        if self.settings.llama is not None:
            rows = with_labels(drawn_tokens(self, count, *shape))
        elif self.task == "SEQ_CLS":
            rows = classified(self.tokenizer, *shape, count, self.seed)
        else:
            rows = with_labels(continued(self.tokenizer, *shape, count, self.seed))
        return self._placed(rows)

    def calibration_batches(self, count: int) -> list[Batch]:
        """Running text without padding and without labels, of exactly (rows, row_tokens)."""
        shape = self.settings.rows, self.settings.row_tokens
        if self.settings.layer is not None:
            return self._placed(drawn_rows(self, count, *shape))
        if self.settings.llama is not None:
            return self._placed(drawn_tokens(self, count, *shape))
        return self._placed(continued(self.tokenizer, *shape, count, self.seed))

    def _placed(self, batches: Iterator[Batch]) -> list[Batch]:
        return [{key: value.to(self.device) for key, value in row.items()} for row in batches]


def load_subject(name: str, settings: BenchmarkConfig) -> Subject:
    """Load or build the model called `name` in the settings.

    Raises:
        ConfigurationError: it does not fit where it should be.
    """
    chosen = settings.models[name]
    device = torch.device(settings.device)
    if chosen.layer is not None:
        model, known = single_layer(chosen.layer, device, settings.seed)
        return Subject(name, chosen, model, None, device, settings.seed, known, tuple(known))
    if chosen.llama is not None:
        model, known = llama(name, chosen.llama, device, settings.seed)
        return Subject(name, chosen, model, None, device, settings.seed, known)
    kind = PACKAGED.get(chosen.source)
    loaded = load_model(
        kind() if kind else LocalModel(name=name, path=chosen.source),
        task_type=chosen.task,
        labels=LABELS,
        head_seed=settings.seed,
    )
    return Subject(name, chosen, loaded.model.to(device), loaded.tokenizer, device, settings.seed)


def reviews(seed: int) -> list[Labelled]:
    """The training sentences, in a seeded order."""
    examples = load_data(RottenTomatoes()).train
    generator = torch.Generator().manual_seed(seed)
    return [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]


def classified(tokenizer: Any, rows: int, tokens: int, count: int, seed: int) -> Iterator[Batch]:
    """Sentences padded or cut to the same length, with their class."""
    endless = cycle(reviews(seed))
    for _ in range(count):
        chosen = list(islice(endless, rows))
        batch = tokenizer(
            [review.text for review in chosen],
            truncation=True,
            max_length=tokens,
            padding="max_length",
            return_tensors="pt",
        )
        yield {**batch, "labels": torch.tensor([review.label for review in chosen])}


def continued(tokenizer: Any, rows: int, tokens: int, count: int, seed: int) -> Iterator[Batch]:
    """Sentences one after another, cut into rows without padding."""
    size = rows * tokens
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    waiting: list[int] = []
    endless = cycle(reviews(seed))
    for _ in range(count):
        while len(waiting) < size:
            told = tokenizer(next(endless).text, add_special_tokens=False)
            waiting += [*told["input_ids"], end]
        ids = torch.tensor(waiting[:size]).view(rows, tokens)
        waiting = waiting[size:]
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_labels(batches: Iterator[Batch]) -> Iterator[Batch]:
    """A language model's labels: it shifts them itself."""
    for batch in batches:
        yield {**batch, "labels": batch["input_ids"].clone()}


def drawn_tokens(subject: Subject, count: int, rows: int, tokens: int) -> Iterator[Batch]:
    """Tokens without meaning."""
    generator = torch.Generator().manual_seed(subject.seed)
    size = subject.model.config.vocab_size
    for _ in range(count):
        ids = torch.randint(0, size, (rows, tokens), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def drawn_rows(subject: Subject, count: int, rows: int, tokens: int) -> Iterator[Batch]:
    """Gaussian inputs of a single layer, of variances 1 / i in a basis that W does not share."""
    generator = torch.Generator().manual_seed(subject.seed)
    width = subject.settings.layer.columns
    deviations = torch.arange(1, width + 1) ** -0.5
    signs = torch.randint(0, 2, (width, 1), generator=generator).mul(2).sub(1).float()
    for _ in range(count):
        drawn = torch.randn(width, rows * tokens, generator=generator) * deviations[:, None]
        yield {"x": cosine_transform(signs * cosine_transform(drawn)).T.contiguous()}
