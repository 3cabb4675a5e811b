"""A model with a task, which its losses need.

all-MiniLM is a classifier of film reviews (fresh or rotten) with a random head. All other models
are language models of film plots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigurationError
from .corpus import (
    joined_blocks,
    language_batches,
    load_labelled,
    load_texts,
    sentence_batches,
)
from .subject import Layer, Subject, load_subject, place

CLASSIFIER = "minilm"

Batches = list[Mapping[str, Tensor]]


@dataclass
class TaskData:
    """How much data a model sees.

    Attributes:
        batch_size, length: sequences per batch, and tokens per sequence (at most, for sentences).
        every: one of so many transformer blocks is measured.
        moved: also measure methods that change the model's function at step 0. Their gradients
            need additional passes.
    """

    batch_size: int
    length: int
    every: int
    moved: bool


def load_with_task(model: str, device: str) -> Subject:
    """Load the model with its head on its device."""
    task_type = "SEQ_CLS" if model == CLASSIFIER else "CAUSAL_LM"
    subject = load_subject(model, task_type=task_type, labels=("rotten", "fresh"))
    subject.model.to(place(device))
    return subject


def task_batches(subject: Subject, split: str, count: int, *, size: int, length: int) -> Batches:
    """The first `count` sequences of a split (by film) in batches of `size`, with labels.

    Raises:
        ConfigurationError: the split has fewer.
    """
    if subject.name == CLASSIFIER:
        texts, labels = load_labelled(split, count)
        there = len(texts)
        batches = sentence_batches(
            subject.tokenizer, texts, length=length, size=size, labels=labels
        )
    else:
        blocks = joined_blocks(
            subject.tokenizer, load_texts("plots", split), length=length, tokens=count * length
        )
        there, batches = len(blocks), language_batches(blocks, size)
    if there < count:
        raise ConfigurationError(
            f"{count} sequences of {length} tokens are not supported: must be at most {there}, "
            f"those of the films of {split}. Use fewer or shorter ones."
        )
    return batches


def sequence_count(subject: Subject, split: str, *, length: int) -> int:
    """The number of sequences in an epoch of a split."""
    if subject.name == CLASSIFIER:
        return len(load_labelled(split)[0])
    return len(joined_blocks(subject.tokenizer, load_texts("plots", split), length=length))


def described_data(model: str) -> str:
    """The data of a model in words."""
    if model == CLASSIFIER:
        return "film reviews, loss of a classifier not yet trained"
    return "film plots, loss of the next token"


def measured_layers(subject: Subject, every: int) -> list[Layer]:
    """The layers of one in `every` blocks.

    Raises:
        ConfigurationError: the model has too few blocks.
    """
    layers = subject.every(every)
    if not layers:
        raise ConfigurationError(
            f"every={every} is not supported: {subject.name} has too few blocks. Lower every."
        )
    return layers
