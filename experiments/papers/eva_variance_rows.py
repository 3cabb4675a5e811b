"""What EVA's claims need of every model: inputs, first gradients, ranks, and the cost of a start.

The seconds of a start are those in the library's report: calibration, allocation and decomposition,
without a cache. They are compared with a training step of the same model, and with a full singular
value decomposition of every weight, as the paper of PiSSA uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lora_init import LoraModel, get_peft_model
from lora_init.calibration.batches import moved
from lora_init.progress import tracked

from ..console import say
from .eva_variance_gradients import measure_gradients
from .eva_variance_inputs import measure_inputs
from .reproduction import Measurement, Options, require, require_at_least
from .starts import UNCENTRED, check_methods, configuration
from .subject import DESCRIBED, Layer, Subject, short_name, timed
from .tasks import (
    Batches,
    TaskData,
    described_data,
    load_with_task,
    measured_layers,
    sequence_count,
    task_batches,
)

EVAS = ("eva", UNCENTRED)
PAPER_SHARES = {"olora": 0.1, "eva": 0.7, "pissa": 1.5, "lora_ga": 2.4, "corda": 4.5}
"""The paper's percent of the training time at batch 16."""
METHODS = ("kaiming", *PAPER_SHARES)
FULL_SVD = "full SVD of all weights"
Rows = dict[str, list[dict[str, Any]]]


@dataclass
class Data(TaskData):
    """How much data a model sees; ranks are chosen over all blocks.

    Attributes:
        batches: of the calibration. As many batches of other films test it.
        gradient_batches: the first so many of the test's batches give the gradients.
    """

    batches: int
    gradient_batches: int

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "length", "gradient_batches", "every")
        require_at_least(self, 2, "batches")
        fits = self.gradient_batches <= self.batches
        require(self, "gradient_batches", fits, f"at most batches={self.batches}")


@dataclass
class EvaVarianceOptions(Options):
    """What is measured.

    Attributes:
        models: as `load_subject` takes them. minilm is measured as a classifier of film reviews
            with `encoder`, others as language models of film plots with `language`.
        rank: the rank of comparisons at one rank.
        ranks: the ranks of the explained variance.
        rho: limits the redistribution of ranks.
        orders: random orders of the calibration's batches, in addition to the given order.
        methods: registered names whose first gradients are compared; null for all that have one.
        cost_model: the model whose starts are timed, on the layers of one of `cost_every` blocks.
        cost_batch: sequences per batch there.
        cost_steps: the number of timed training steps, of which the median counts.
    """

    models: list[str] = field(default_factory=lambda: ["smollm2", "minilm"])
    rank: int = 16
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    rho: float = 2.0
    orders: int = 3
    methods: list[str] | None = None
    language: Data = field(default_factory=lambda: Data(4, 64, 6, False, 16, 4))
    encoder: Data = field(default_factory=lambda: Data(4, 48, 1, True, 90, 8))
    cost_model: str = "minilm"
    cost_every: int = 1
    cost_batch: int = 16
    cost_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "models", bool(self.models), "one or more, such as smollm2")
        require(self, "ranks", min(self.ranks, default=0) >= 1, "integers >= 1")
        require(self, "rank", self.rank in self.ranks, f"one of ranks={self.ranks}")
        require(self, "rho", self.rho >= 1, "a number >= 1")
        require_at_least(self, 1, "orders", "cost_every", "cost_batch", "cost_steps")
        if self.methods is not None:
            check_methods(self.methods)
            require(
                self,
                "methods",
                {*EVAS, "kaiming"} <= set(self.methods),
                f"a list with {', '.join(EVAS)} and kaiming, which the claims compare",
            )

    def data(self, model: str) -> Data:
        """The amount of data of one model."""
        return self.encoder if model == "minilm" else self.language


def measure(options: EvaVarianceOptions) -> Measurement:
    """Measure the inputs and first gradients of every model, then the cost of a start."""
    rows: Rows = {}
    for model in options.models:
        for name, found in rows_of_model(model, options).items():
            rows.setdefault(name, []).extend({"model": short_name(model), **row} for row in found)
    rows["costs"], epoch = time_starts(options)
    frames = {name: pd.DataFrame(found) for name, found in rows.items()}
    return Measurement(options, frames, facts(frames["gradients"], epoch, options))


def rows_of_model(model: str, options: EvaVarianceOptions) -> Rows:
    """Explained variance, convergence, ranks and gradients of one model."""
    data = options.data(model)
    subject = load_with_task(model, options.device)
    layers = measured_layers(subject, data.every)
    own, fresh = (
        task_batches(
            subject, split, data.batches * data.batch_size, size=data.batch_size, length=data.length
        )
        for split in ("train", "test")
    )
    explained, converged, turned, ranks = measure_inputs(subject, layers, own, fresh, options)
    some = fresh[: data.gradient_batches]
    return {
        "explained": explained,
        "convergence": converged,
        "turning": [{"size": data.batch_size, **row} for row in turned],
        "ranks": ranks,
        "gradients": measure_gradients(subject, layers, own, some, options, data.moved),
    }


def time_starts(options: EvaVarianceOptions) -> tuple[list[dict], float]:
    """Time the starts on the calibration's sequences, in batches of `cost_batch`.

    Returns:
        Rows by method, and the seconds of one epoch of training.
    """
    data = options.data(options.cost_model)
    subject = load_with_task(options.cost_model, options.device)
    count = data.batches * data.batch_size
    own = task_batches(subject, "train", count, size=options.cost_batch, length=data.length)
    epoch = sequence_count(subject, "train", length=data.length)
    layers = measured_layers(subject, options.cost_every)
    return measure_costs(subject, layers, own, epoch, options)


def facts(gradients: pd.DataFrame, epoch: float, options: EvaVarianceOptions) -> dict[str, str]:
    """Models and data in words."""
    layers = gradients.groupby("model")["layer"].nunique()
    found = {
        short_name(model): f"{DESCRIBED.get(model, model)}; {described_data(model)}; and "
        f"gradients of {layers[short_name(model)]} layers, ranks over all"
        for model in options.models
    }
    return found | {
        "methods": "s = 1, the library’s options (eva: rho = 1 except for the ranks; "
        "eva_uncentred: center = False; lora_one: gamma = 8 √r)",
        "cost": f"{short_name(options.cost_model)}; an epoch is {epoch:.0f} s; wall clock on a "
        "shared machine",
        "the paper’s": "Llama-2-7B, Llama-3.1-8B and Gemma-2-9B on MetaMathQA and others",
    }


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
    say(f"  {subject.name}: the cost of an initialization, compared with a training step")
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
    device = next(subject.model.parameters()).device
    whole, _ = timed(device, lambda: full_decompositions(subject, layers))
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
    return median([timed(place, lambda batch=batch: one(batch))[0] for batch in taken][1:])


def full_decompositions(subject: Subject, layers: Sequence[Layer]) -> None:
    for _, weight in subject.weights(list(layers)):
        torch.linalg.svd(weight, full_matrices=False)
