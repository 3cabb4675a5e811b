"""A classifier of sentences: its batches, and a head that is trained alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lora_init.config.lora_config import HEADS

from ..data import Labelled, rotten_tomatoes
from ..errors import ConfigurationError
from ..tasks import draw
from ..tasks.text_classification import TextClassification
from .subject import Subject, load_subject

HEAD_RATE = 1e-2
Batch = dict[str, Tensor]


def load_classifier(model: str, seed: int, device: torch.device) -> Subject:
    """The model with a new head, and attention that can be differentiated twice."""
    subject = load_subject(
        model, task_type="SEQ_CLS", labels=rotten_tomatoes.LABELS, head_seed=seed
    )
    subject.model.set_attn_implementation("eager")
    subject.model.requires_grad_(False).to(device)
    return subject


def draw_batches(
    subject: Subject,
    examples: Sequence[Labelled] | None = None,
    *,
    count: int,
    size: int,
    length: int,
    seed: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Labeled training sentences, drawn without repetition; None takes the film reviews."""
    if examples is None:
        examples = list(rotten_tomatoes.load(rotten_tomatoes.RottenTomatoes()).train)
    if count * size > len(examples):
        raise ConfigurationError(
            f"{count} batches of {size} sentences are not supported: must be at most "
            f"{len(examples)} sentences in all."
        )
    task = TextClassification(subject.tokenizer, length)
    chosen = draw(len(examples), count * size, seed)
    for first in range(0, count * size, size):
        batch = task.collate([examples[index] for index in chosen[first : first + size]])
        yield {key: value.to(device) for key, value in batch.items()}


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the base model's classification head."""
    heads = HEADS["SEQ_CLS"]
    return [p for name, p in model.named_parameters() if set(name.split(".")) & set(heads)]


def train_head(subject: Subject, batches: Iterator[Batch]) -> float:
    """Train the head alone, one step per batch; return the last loss."""
    parameters = head_parameters(subject.model)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=HEAD_RATE, weight_decay=0.0)
    loss = torch.tensor(float("nan"))
    for batch in batches:
        loss = subject.model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    subject.model.requires_grad_(False)
    return float(loss.detach())
