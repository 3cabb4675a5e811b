"""A training step (forward, backward, AdamW) of LoRA and of DoRA, ours and PEFT's taking turns.

All models are in memory at once and start from the same weights and the same factors, so their
losses have to agree at every step: the largest relative difference is the quality beside the
speed. DoRA's cost over LoRA comes from the same rounds.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from experiments.benchmark.clock import Clock
from experiments.benchmark.contenders import Request, adapt_ours, adapt_peft, copy_factors
from experiments.benchmark.ratios import paired_ratio
from experiments.benchmark.rows import Hear, Row, ignore, verdict
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.subjects import Batch, Subject, load_subject
from experiments.benchmark.timing import Contender, take_turns

TITLE = "a training step, forward + backward + AdamW"
LABELS = {"lora": "LoRA", "dora": "DoRA"}


def run(settings: BenchmarkConfig, hear: Hear = ignore, clock: Clock | None = None) -> list[Row]:
    rows = []
    for name in settings.steps.models:
        for row in measure(name, settings):
            rows.append(row)
            hear(row)
    return rows


def measure(name: str, settings: BenchmarkConfig) -> list[Row]:
    """The rows of one model: each adapter, and DoRA's cost over LoRA."""
    subject = load_subject(name, settings)
    models, refused = adapted(subject, settings)
    total = settings.steps.warmup + settings.steps.rounds
    batches = subject.training_batches(total)
    contenders = {
        key: Contender(batches.__getitem__, stepper(model, settings.steps.learning_rate))
        for key, model in models.items()
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    losses: dict[str, list[float]] = defaultdict(list)
    for turn in take_turns(contenders, total, subject.device, f"steps of {name}"):
        losses[turn.contender].append(float(turn.result))
        if turn.round >= settings.steps.warmup:
            seconds[turn.contender].append(turn.seconds)
    rows = []
    for adapter in settings.steps.adapters:
        if adapter in refused:
            rows.append(Row("steps", name, LABELS[adapter], "s", note=refused[adapter]))
            continue
        keys = f"ours {adapter}", f"peft {adapter}"
        rows.append(
            compared(subject, adapter, *(seconds[k] for k in keys), *(losses[k] for k in keys))
        )
    if {"ours lora", "ours dora"} <= seconds.keys():
        rows.append(overhead(name, seconds))
    return rows


def adapted(
    subject: Subject, settings: BenchmarkConfig
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The models by "contender adapter", and the adapters that ours refuses, with the reason."""
    models: dict[str, nn.Module] = {}
    refused = {}
    for adapter in settings.steps.adapters:
        request = Request(
            subject.task, settings.rank, settings.alpha, settings.seed,
            dora=adapter == "dora",
        )  # fmt: skip
        try:
            ours = adapt_ours(copy.deepcopy(subject.model), request)
        except NotImplementedError as error:
            refused[adapter] = f"skipped: {error}"
            continue
        theirs = adapt_peft(copy.deepcopy(subject.model), request)
        copy_factors(ours, theirs)
        models[f"ours {adapter}"], models[f"peft {adapter}"] = ours.train(), theirs.train()
    return models, refused


def stepper(model: nn.Module, learning_rate: float) -> Callable[[Batch], torch.Tensor]:
    """A function that trains `model` on one batch and returns the loss."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate)

    def step(batch: Batch) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def compared(
    subject: Subject,
    adapter: str,
    ours: list[float],
    theirs: list[float],
    our_losses: list[float],
    their_losses: list[float],
) -> Row:
    """One adapter's row."""
    ratio = paired_ratio(theirs, ours)
    target = subject.settings.targets.get(adapter)
    gaps = [abs(a - b) / abs(b) for a, b in zip(our_losses, their_losses, strict=True)]
    return Row(
        "steps", subject.name, LABELS[adapter], "s",
        ours=median(ours), peft=median(theirs), ratio=ratio, target=target,
        verdict=verdict(ratio, target),
        figures={"loss difference": max(gaps)},
    )  # fmt: skip


def overhead(name: str, seconds: dict[str, list[float]]) -> Row:
    """DoRA's time over LoRA's, ours and PEFT's."""
    ours = [d / l for d, l in zip(seconds["ours dora"], seconds["ours lora"], strict=True)]  # noqa: E741
    theirs = [d / l for d, l in zip(seconds["peft dora"], seconds["peft lora"], strict=True)]  # noqa: E741
    return Row(
        "steps", name, "DoRA's step over LoRA's", "×",
        ours=median(ours), peft=median(theirs), ratio=paired_ratio(theirs, ours),
    )  # fmt: skip
