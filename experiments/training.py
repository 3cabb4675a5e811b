"""The training loop: Accelerate, AdamW, a warm-up and a decay; the same for every method."""

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

from experiments.errors import RunFailed
from experiments.tasks import SeededBatches, Task

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}
PRECISIONS = ("no", "bf16", "fp16")


@dataclass
class TrainingConfig:
    """How long and how fast to train, and how to evaluate.

    Attributes:
        steps, batch_size: optimizer steps, and examples a step over all processes.
        learning_rate: of the adapters, at its peak.
        head_learning_rate: of everything else that is trained (a new head); None: the same.
        warmup: the share of steps over which the rate rises from zero.
        schedule: what follows: linear, cosine or constant.
        max_grad_norm: clip the gradient's norm; None leaves it.
        mixed_precision: no, bf16 or fp16.
        max_length: tokens of an example, longer ones are cut.
        validate_every: evaluate on the validation split every so many steps and at the end; 0: no.
        validate_at_start: and before the first step.
        generate_limit, max_new_tokens: causal only: answers generated a split, and their length.
        save_adapter: write the trained adapter into the run's folder.
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    schedule: str = "linear"
    max_grad_norm: float | None = 1.0
    mixed_precision: str = "no"
    max_length: int = 64
    eval_batch_size: int = 64
    validate_every: int = 0
    validate_at_start: bool = False
    generate_limit: int = 32
    max_new_tokens: int = 8
    save_adapter: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_length", "eval_batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"training.{name}={getattr(self, name)}; allowed are integers >= 1"
                )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(
                f"training.learning_rate={self.learning_rate}; allowed are finite numbers > 0"
            )
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"training.warmup={self.warmup}; allowed are shares 0.0 <= x < 1.0")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"training.schedule={self.schedule!r}; allowed are {', '.join(SCHEDULES)}"
            )
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(
                f"training.mixed_precision={self.mixed_precision!r}; allowed are "
                f"{', '.join(PRECISIONS)}"
            )


@dataclass(frozen=True)
class TrainingSummary:
    """What the loop knows afterwards; the gradient norms are the first step's, before clipping."""

    steps: int
    seconds: float
    tokens: int
    gradient_norms: dict[str, float]


def make_accelerator(settings: TrainingConfig, device: str) -> Accelerator:
    """A fresh accelerator. Its state outlives a run, and a sweep has many runs in one process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=settings.mixed_precision,
        # A batch is split over the processes, so that their number changes no batch.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )


def learning_rate_factor(step: int, settings: TrainingConfig) -> float:
    """What the peak rate is multiplied by at `step`, counted from 0; never 0 itself."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[settings.schedule]((step - warmup) / max(settings.steps - warmup, 1))


def parameter_groups(model: torch.nn.Module) -> dict[str, list[torch.nn.Parameter]]:
    """The trainable parameters: factors A, factors B, and everything else (a head)."""
    groups: dict[str, list[torch.nn.Parameter]] = {"A": [], "B": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            kind = "A" if "lora_A" in parts else "B" if "lora_B" in parts else "head"
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
    advance: Callable[[int, float], None] = lambda step, loss: None,
) -> TrainingSummary:
    """Train `model` in place.

    Args:
        seed: the order of the examples, and the dropout masks of models that have any.
        record: called once a step with the figures of that step.
        validate: called with the number of steps done, when validation is due.
        advance: called with the number of steps done and the loss.

    Raises:
        RunFailed: a loss that is not finite.
    """
    batches = SeededBatches(len(examples), settings.batch_size, settings.steps, seed)
    groups = parameter_groups(model)
    head_rate = settings.head_learning_rate or settings.learning_rate
    optimizer = torch.optim.AdamW(
        [
            {"params": groups["A"] + groups["B"], "lr": settings.learning_rate},
            {"params": groups["head"], "lr": head_rate},
        ],
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings)
    )
    loader = DataLoader(examples, batch_sampler=batches, collate_fn=task.collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    torch.manual_seed(seed)
    first_norms: dict[str, float] = {}
    tokens, paused, started = 0, 0.0, time.perf_counter()
    for step, batch in enumerate(loader, start=1):
        step_started = time.perf_counter()
        rate = schedule.get_last_lr()[0]
        loss = accelerator.reduce(backward(model, batch, accelerator), "mean").item()
        if not math.isfinite(loss):
            raise RunFailed(
                f"the loss is {loss} at step {step} of {settings.steps}: training diverged; "
                f"lower training.learning_rate={settings.learning_rate:g} (PiSSA, OLoRA and CorDA "
                "stand a lower rate than kaiming), or lower training.max_grad_norm",
                step=step,
                loss=str(loss),
                learning_rate=settings.learning_rate,
            )
        accelerator.unscale_gradients(optimizer)  # fp16 scales them; norms are of the true ones
        if step == 1:
            first_norms = gradient_norms(groups)
        norm = clip(groups, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

        seen = int(batch["attention_mask"].sum()) * accelerator.num_processes
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
        due = settings.validate_every and step % settings.validate_every == 0
        if due or (settings.validate_every and step == settings.steps):
            pause = time.perf_counter()
            validate(step)
            model.train()
            paused += time.perf_counter() - pause
    return TrainingSummary(
        settings.steps, time.perf_counter() - started - paused, tokens, first_norms
    )


def backward(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], accelerator: Accelerator
) -> torch.Tensor:
    """Forward and backward pass of one batch; returns the detached loss."""
    with accelerator.autocast():
        loss = model(**batch).loss
    accelerator.backward(loss)
    return loss.detach()


def gradient_norms(groups: dict[str, list[torch.nn.Parameter]]) -> dict[str, float]:
    """The gradient's norm in total, by factor and of the head."""
    norms = {name: float(norm_of(group)) for name, group in groups.items()}
    return {"total": math.sqrt(sum(norm**2 for norm in norms.values())), **norms}


def norm_of(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The Euclidean norm of all gradients together. They were averaged over processes before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.tensor(0.0)


def clip(groups: dict[str, list[torch.nn.Parameter]], limit: float | None) -> float:
    """Scale the gradients down to `limit`; returns their norm before."""
    parameters = [parameter for group in groups.values() for parameter in group]
    norm = norm_of(parameters)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)
