"""Every method's start on one classifier, and the batches that curvature is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from experiments.data import Labelled, rotten_tomatoes
from experiments.errors import ConfigurationError
from experiments.papers.subject import Subject, load_subject
from experiments.tasks import draw
from experiments.tasks.text_classification import TextClassification
from lora_init import LoraConfig, LoraModel, get_peft_model
from lora_init.config import HEADS

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
    subject: Subject, *, count: int, size: int, length: int, seed: int, device: torch.device
) -> Iterator[Batch]:
    """Labelled training sentences, drawn without repetition."""
    examples = training_examples()
    if count * size > len(examples):
        raise ConfigurationError(
            f"{count} batches of {size} sentences; there are {len(examples)} in all"
        )
    task = TextClassification(subject.tokenizer, length)
    chosen = draw(len(examples), count * size, seed)
    for first in range(0, count * size, size):
        batch = task.collate([examples[index] for index in chosen[first : first + size]])
        yield {key: value.to(device) for key, value in batch.items()}


def training_examples() -> list[Labelled]:
    return list(rotten_tomatoes.load(rotten_tomatoes.RottenTomatoes()).train)


@contextmanager
def started(
    subject: Subject, method: str, *, rank: int, scaling: float, calibration: list[Batch], seed: int
) -> Iterator[LoraModel]:
    """The model with an adapter that starts by `method`; the base is given back afterwards.

    Raises:
        ConfigurationError: the method's refusal.
    """
    try:
        config = LoraConfig(
            r=rank, lora_alpha=scaling * rank, target_modules="all-linear", task_type="SEQ_CLS",
            init_lora_weights=method,
        )  # fmt: skip
        needed = config.initializer()[0].calibration is not None
        model = get_peft_model(
            subject.model, config, calibration=calibration if needed else None, seed=seed,
            cache=False, keep_original=True,
        )  # fmt: skip
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigurationError(f"methods={method}: {error}") from error
    try:
        yield model
    finally:
        model.unload()
        subject.model.requires_grad_(False)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained factors, without the head."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and {"lora_A", "lora_B"} & set(name.split("."))
    ]


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the base model's classification head."""
    heads = HEADS["SEQ_CLS"]
    return [p for name, p in model.named_parameters() if set(name.split(".")) & set(heads)]


def train_head(subject: Subject, batches: Iterator[Batch]) -> float:
    """Train the head alone, everything below it frozen, a step a batch; returns the last loss."""
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
