"""The time of a training step (forward, backward, AdamW) of LoRA and of DoRA.

All models start from the same weights and the same factors, and read the same batches, so their
losses must agree at every step.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from statistics import median

import torch
from torch import nn

from .contenders import Request, adapt_ours, adapt_peft, copy_factors
from .row import OURS, PEFT, Case, Row
from .schema import BenchmarkConfig
from .timing import Contender, alternate, paired_ratio
from .workload import Batch, Workload, load_workload

TITLE = "Training steps"
LEARNING_RATE = 1e-4
ADAPTERS = ("LoRA", "DoRA")


def cases(settings: BenchmarkConfig) -> Iterator[Case]:
    for name in settings.steps.models:
        yield Case("steps", name, "LoRA and DoRA", partial(measure, settings, name))


def measure(settings: BenchmarkConfig, name: str) -> Iterator[Row]:
    """Yield a row for each adapter; the first round warms up and does not count."""
    workload, chosen = load_workload(name, settings), settings.steps
    batches = workload.training_batches(chosen.rounds + 1)
    contenders = {
        f"{library} {adapter}": stepper(model, batches)
        for adapter in ADAPTERS
        for library, model in adapted(workload, settings, adapter == "DoRA").items()
    }
    seconds, losses = defaultdict(list), defaultdict(list)
    for turn in alternate(contenders, chosen.rounds + 1, chosen.budget, workload.device, 2):
        losses[turn.name].append(float(turn.result))
        if turn.round:
            seconds[turn.name].append(turn.seconds)
    for adapter in ADAPTERS:
        yield compared(name, adapter, settings.rank, seconds, losses)


def adapted(workload: Workload, settings: BenchmarkConfig, dora: bool) -> dict[str, nn.Module]:
    request = Request(
        workload.settings.task, settings.rank, settings.alpha, settings.seed, dora=dora,
        exclude=workload.settings.exclude,
    )  # fmt: skip
    ours = adapt_ours(copy.deepcopy(workload.model), request)
    theirs = adapt_peft(copy.deepcopy(workload.model), request)
    copy_factors(ours, theirs)
    return {OURS: ours.train(), PEFT: theirs.train()}


def stepper(model: nn.Module, batches: Sequence[Batch]) -> Contender:
    """Return a contender that trains `model` on the next batch and returns the loss."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)

    def step(batch: Batch) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Contender(partial(next, cycle(batches)), step)


def compared(
    name: str,
    adapter: str,
    rank: int,
    seconds: dict[str, list[float]],
    losses: dict[str, list[float]],
) -> Row:
    ours, theirs = f"{OURS} {adapter}", f"{PEFT} {adapter}"
    gap = max(abs(a - b) / abs(b) for a, b in zip(losses[ours], losses[theirs], strict=True))
    return Row(
        "steps", name, adapter, rank, ours=median(seconds[ours]), peft=median(seconds[theirs]),
        ratio=paired_ratio(seconds[theirs], seconds[ours]), error=gap, kind="loss",
    )  # fmt: skip
