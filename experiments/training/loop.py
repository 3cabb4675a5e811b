"""The training loop: AdamW with a warm-up and a decay, the same for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from ..config.training import SCHEDULES, TrainingConfig
from ..errors import RunFailed
from ..tasks import SeededBatches, Task
from .checkpoint import Checkpoints, Progress
from .micro_batches import backward


@dataclass(frozen=True)
class TrainingSummary:
    """The totals of a training, and the gradient norms of its first step before clipping."""

    steps: int
    seconds: float
    tokens: int
    gradient_norms: dict[str, float]


def make_accelerator(settings: TrainingConfig, device: str) -> Accelerator:
    """A new accelerator. Its global state is reset: a sweep has many runs in one process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=settings.mixed_precision,
        # A batch is split over the processes, so their number does not change a batch.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )


def parameter_groups(model: torch.nn.Module) -> dict[str, list[torch.nn.Parameter]]:
    """The trainable parameters: factors A or cores, factors B, and everything else (a head)."""
    groups: dict[str, list[torch.nn.Parameter]] = {"A": [], "B": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            first = "lora_A" in parts or "lora_core" in parts
            kind = "A" if first else "B" if "lora_B" in parts else "head"
            groups[kind].append(parameter)
    return groups


def train(
    model: torch.nn.Module,
    task: Task,
    examples: Sequence[Any],
    settings: TrainingConfig,
    *,
    seed: int,
    accelerator: Accelerator,
    record: Callable[[dict[str, Any]], None],
    validate: Callable[[int], None] = lambda step: None,
    observe: Callable[[int], None] = lambda step: None,
    advance: Callable[[int, float], None] = lambda step, loss: None,
    checkpoints: Checkpoints | None = None,
    micro_batch_size: int | None = None,
) -> TrainingSummary:
    """Train `model` in place.

    Args:
        seed: decides the order of the examples, and the dropout masks.
        record: called once per step with the figures of that step.
        validate: called with the number of steps done, when validation is due.
        observe: called with the number of steps done after every step, to read the model. Neither
            this nor validation counts as training time.
        advance: called with the number of steps done and the loss.
        checkpoints: where to continue, and when to save. `model` already has the saved adapter.
        micro_batch_size: examples per forward pass of a process; None takes its whole batch.

    Raises:
        RunFailed: a loss, a gradient or a trained weight is not finite, or the time is over.
    """
    checkpoints = checkpoints or Checkpoints()
    begun = checkpoints.progress
    batches = SeededBatches(
        len(examples), settings.batch_size, settings.steps, seed, start=begun.step
    )
    groups = parameter_groups(model)
    head_rate = settings.head_learning_rate or settings.learning_rate
    optimizer = torch.optim.AdamW(
        [
            {"params": groups["A"], "lr": settings.learning_rate},
            {"params": groups["B"], "lr": settings.learning_rate * settings.lora_plus_ratio},
            {"params": groups["head"], "lr": head_rate},
        ],
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings)
    )
    loader = DataLoader(examples, batch_sampler=batches, collate_fn=task.collate)
    adapted = model
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    checkpoints.restore(optimizer, schedule, accelerator)

    model.train()
    torch.manual_seed(seed)
    first_norms = begun.gradient_norms
    tokens, paused, started = begun.tokens, 0.0, time.perf_counter() - begun.seconds
    for step, batch in enumerate(loader, start=begun.step + 1):
        if step == begun.step + 1:
            checkpoints.restore_generators(accelerator)
        step_started = time.perf_counter()
        rate = schedule.get_last_lr()[0]
        loss = backward(model, batch, task, accelerator, micro_batch_size)
        loss = accelerator.reduce(loss, "mean").item()
        refuse_divergence("the loss", loss, step, settings)
        accelerator.unscale_gradients(optimizer)  # fp16 scales them; norms are of unscaled ones
        if step == 1:
            first_norms = gradient_norms(groups)
        norm = clip(groups, settings.max_grad_norm)
        if accelerator.scaler is None:  # a scaler skips steps that overflow
            refuse_divergence("the gradient's norm", norm, step, settings)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

        if step == settings.steps:  # no later loss would show it
            size = float(torch.nn.utils.get_total_norm([p for g in groups.values() for p in g]))
            refuse_divergence("the norm of the trained weights", size, step, settings)
        seen = int(accelerator.reduce(batch["attention_mask"].sum(), "sum"))
        tokens += seen
        seconds = time.perf_counter() - step_started
        record(
            {
                "step": step,
                "split": "train",
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens_per_second": seen / seconds,
            }
        )
        advance(step, loss)
        pause = time.perf_counter()
        observe(step)
        due = settings.validate_every and step % settings.validate_every == 0
        if due or (settings.validate_at_end and step == settings.steps):
            validate(step)
            model.train()
        progress = Progress(step, tokens, pause - started - paused, first_norms)
        checkpoints.step_done(
            progress, adapted, optimizer, schedule, accelerator, last=step == settings.steps
        )
        paused += time.perf_counter() - pause
    return TrainingSummary(
        settings.steps, time.perf_counter() - started - paused, tokens, first_norms
    )


def learning_rate_factor(step: int, settings: TrainingConfig) -> float:
    """The factor on the peak rate at `step`, counted from 0; it is never 0."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[settings.schedule]((step - warmup) / max(settings.steps - warmup, 1))


def refuse_divergence(figure: str, value: float, step: int, settings: TrainingConfig) -> None:
    """End a run that has diverged.

    Raises:
        RunFailed: the value is not finite.
    """
    if math.isfinite(value):
        return
    raise RunFailed(
        f"{figure} is {value} at step {step} of {settings.steps}: training diverged; lower "
        f"training.learning_rate={settings.learning_rate:g} (PiSSA, OLoRA and CorDA need a lower "
        "rate than kaiming), or lower training.max_grad_norm",
        reason="diverged",
        step=step,
        loss=str(value),
        learning_rate=settings.learning_rate,
    )


def gradient_norms(groups: dict[str, list[torch.nn.Parameter]]) -> dict[str, float]:
    """The norm of the whole gradient, and of A, B and the head."""
    norms = {name: float(norm_of(group)) for name, group in groups.items()}
    return {"total": math.sqrt(sum(norm**2 for norm in norms.values())), **norms}


def norm_of(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The Euclidean norm of all gradients together, which were averaged over processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.tensor(0.0)


def clip(groups: dict[str, list[torch.nn.Parameter]], limit: float | None) -> float:
    """Scale the gradients down to `limit`; returns their norm before that."""
    parameters = [parameter for group in groups.values() for parameter in group]
    norm = norm_of(parameters)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)
