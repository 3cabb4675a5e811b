"""Fine-tunings from starts of different accuracy -> rows.

The paper's starts are made by PEFT, whose `pissa_niter_N` is the paper's own code
(`torch.svd_lowrank` with q = r, drawn from the global generator); the exact one by this library
from an eigendecomposition in float64. Everything after the start is the same: model, layers, order
of the data, optimizer.

Two tables of rows, both with start ("niter 1", …, "exact"), niter (missing for exact) and draw:

    steps      a row a step: step and loss
    held_out   a row a block of texts that were not trained on: block and loss, after the last step
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from experiments.console import say
from experiments.errors import ConfigurationError
from experiments.papers.corpus import joined_blocks, load_texts
from experiments.papers.fast_svd.settings import FastSvdSettings
from experiments.papers.fine_tuning import fine_tune
from experiments.papers.language import block_losses
from experiments.papers.subject import Subject
from experiments.schedule import TrainingConfig
from lora_init import LoraConfig, get_peft_model

EXACT = "exact"


@dataclass(frozen=True)
class Training:
    """What the fine-tunings showed; the rows of the module's docstring."""

    steps: pd.DataFrame
    held_out: pd.DataFrame


def train_all(subject: Subject, settings: FastSvdSettings) -> Training:
    """Every start and draw, in the same order of the same blocks."""
    size = settings.batch_size * settings.length
    blocks = joined_blocks(
        subject.tokenizer, load_texts("plots"), length=settings.length,
        tokens=settings.steps * size,
    )  # fmt: skip
    unseen = joined_blocks(
        subject.tokenizer, load_texts("plots", "test"), length=settings.length,
        tokens=settings.held_out * settings.length,
    )  # fmt: skip
    steps: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for niter, draw in planned(settings):
        name = EXACT if niter is None else f"niter {niter}"
        say(f"  fine-tuning from {name}" + ("" if niter is None else f", draw {draw + 1}"))
        started = (
            exact_start(subject, settings)
            if niter is None
            else fast_start(subject, settings, niter, settings.seed + draw)
        )
        trace = fine_tune(
            started, blocks, training(settings), seed=settings.seed, device=settings.device
        )
        losses = block_losses(started, unseen).tolist()
        if niter is None:
            started.unload()
        run = {"start": name, "niter": niter, "draw": draw}
        steps += [{**run, "step": n, "loss": loss} for n, loss in enumerate(trace.losses, start=1)]
        held_out += [{**run, "block": n, "loss": loss} for n, loss in enumerate(losses)]
    return Training(pd.DataFrame(steps), pd.DataFrame(held_out))


def planned(settings: FastSvdSettings) -> Iterator[tuple[int | None, int]]:
    """(niter, draw); the exact start has no draw."""
    yield None, 0
    for niter in settings.starts:
        for draw in range(settings.draws):
            yield niter, draw


def training(settings: FastSvdSettings) -> TrainingConfig:
    return TrainingConfig(
        steps=settings.steps, batch_size=settings.batch_size, schedule="constant", warmup=0.0,
        learning_rate=settings.learning_rate, max_grad_norm=1.0,
    )  # fmt: skip


def adapted(subject: Subject, settings: FastSvdSettings) -> list[int]:
    """The blocks of the model whose layers are adapted."""
    return sorted({layer.block for layer in subject.every(settings.adapted_every)})


def exact_start(subject: Subject, settings: FastSvdSettings) -> nn.Module:
    rank = settings.judged_rank(subject.model.config.hidden_size)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=settings.target_modules,
        layers_to_transform=adapted(subject, settings), task_type="CAUSAL_LM",
        init_lora_weights={"name": "pissa", "method": "gram"},
    )  # fmt: skip
    return get_peft_model(subject.model, config, seed=settings.seed, cache=False)


def fast_start(subject: Subject, settings: FastSvdSettings, niter: int, seed: int) -> nn.Module:
    """PEFT's model on a copy: it changes the base for good.

    Raises:
        ConfigurationError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            "fast_svd: its starts are made by PEFT; pip install peft==0.21.2"
        ) from error
    rank = settings.judged_rank(subject.model.config.hidden_size)
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=settings.target_modules,
        layers_to_transform=adapted(subject, settings), task_type="CAUSAL_LM",
        init_lora_weights=f"pissa_niter_{niter}",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(copy.deepcopy(subject.model), config)
