"""Fine-tunings from starts of different accuracy -> rows.

The paper's starts are made by PEFT, whose `pissa_niter_N` is the paper's own code
(`torch.svd_lowrank` with q = r, drawn from the global generator); the exact one by this library
from an eigendecomposition in float64. Everything after the start is the same: model, layers, order
of the data, optimizer.

Rows, one a step: start ("niter 1", …, "exact"), niter (missing for exact), draw, step, loss, and
on the last step held_out, the loss on texts that were not trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from experiments.console import say
from experiments.errors import ConfigurationError
from experiments.papers.corpora import joined_blocks, load_texts
from experiments.papers.fast_svd.settings import FastSvdSettings
from experiments.papers.fine_tuning import fine_tune
from experiments.papers.subjects import Subject
from experiments.schedule import TrainingConfig
from lora_init import LoraConfig, get_peft_model

EXACT = "exact"
Blocks = Int[Tensor, "blocks length"]


def train_all(subject: Subject, settings: FastSvdSettings) -> list[dict[str, Any]]:
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
    rows = []
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
        held_out = loss_of(started, unseen)
        if niter is None:
            started.unload()
        told = [None] * (settings.steps - 1) + [held_out]
        rows += [
            {"start": name, "niter": niter, "draw": draw, "step": step, "loss": loss,
             "held_out": after}
            for step, (loss, after) in enumerate(zip(trace.losses, told, strict=True), start=1)
        ]  # fmt: skip
    return rows


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


def exact_start(subject: Subject, settings: FastSvdSettings) -> nn.Module:
    rank = settings.judged_rank(subject.model.config.hidden_size)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=settings.target_modules, task_type="CAUSAL_LM",
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
        r=rank, lora_alpha=rank, target_modules=settings.target_modules, task_type="CAUSAL_LM",
        init_lora_weights=f"pissa_niter_{niter}",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(copy.deepcopy(subject.model), config)


@torch.no_grad()
def loss_of(model: nn.Module, blocks: Blocks) -> float:
    """The mean loss of a token, a block at a time."""
    model.eval()
    device = next(model.parameters()).device
    losses = [model(input_ids=b, labels=b).loss for b in blocks.to(device).split(1)]
    return float(torch.stack(losses).double().mean())
