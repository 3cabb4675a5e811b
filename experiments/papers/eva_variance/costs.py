"""What an initialization costs beside the training that follows it.

Seconds are those that the library reports of its own steps (calibration, allocation, decomposition;
nothing from a cache), beside those of training steps of the same model with the same adapter. A
full singular value decomposition of every weight, which the papers' PiSSA takes, is timed as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from lora_init import LoraModel, get_peft_model
from lora_init.calibration.batches import moved
from lora_init.progress import tracked

from ...console import say
from ..starts import configuration
from ..subject import Layer, Subject
from ..tasks import Batches
from .options import EvaVarianceOptions

# percent of the training time at batch 16, EVA's paper.
PAPER_SHARES = {"olora": 0.1, "eva": 0.7, "pissa": 1.5, "lora_ga": 2.4, "corda": 4.5}
METHODS = ("kaiming", *PAPER_SHARES)
FULL_SVD = "full SVD of all weights"


def measure_costs(
    subject: Subject,
    layers: Sequence[Layer],
    own: Batches,
    sequences: int,
    options: EvaVarianceOptions,
) -> tuple[list[dict], float]:
    """Rows by method, and the seconds of one epoch.

    Args:
        layers: that are adapted.
        own: the calibration's batches.
        sequences: in an epoch.
    """
    names = [layer.name for layer in layers]
    say(f"  {subject.name}: what an initialization costs beside a training step")
    step = 0.0
    rows = []
    for method in tracked(METHODS, "timing"):
        config = configuration(method, names, options.rank)
        model = get_peft_model(
            subject.model, config, calibration=own, seed=options.seed, cache=False
        )
        try:
            spent = dict(model.init_report().seconds)
            if method == "kaiming":
                step = seconds_of_step(model, own, options.cost_steps)
        finally:
            model.unload()
        rows.append({"method": method, "seconds": spent["total"] - spent["inject"]})
    whole = timed(lambda: full_decompositions(subject, layers))
    rows.append({"method": FULL_SVD, "seconds": whole})
    steps = -(-sequences // options.cost_batch)
    for row in rows:
        row["steps"] = row["seconds"] / step
        row["share"] = 100 * row["seconds"] / (steps * step)
        row["paper"] = PAPER_SHARES.get(row["method"])
    return rows, steps * step


def seconds_of_step(model: LoraModel, batches: Batches, steps: int) -> float:
    """The median over some steps of AdamW, after one that is not counted."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    place = next(model.parameters()).device

    def one(batch: Mapping[str, Tensor]) -> None:
        model(**moved(batch, place)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    taken = [batches[index % len(batches)] for index in range(steps + 1)]
    return median([timed(lambda batch=batch: one(batch)) for batch in taken][1:])


def full_decompositions(subject: Subject, layers: Sequence[Layer]) -> None:
    for _, weight in subject.weights(list(layers)):
        torch.linalg.svd(weight, full_matrices=False)


def timed(work: Callable[[], None]) -> float:
    """Wall-clock seconds; on an accelerator until its queue is empty."""
    waiting = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    waiting()
    began = time.perf_counter()
    work()
    waiting()
    return time.perf_counter() - began
