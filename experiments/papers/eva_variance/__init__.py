"""EVA: A holds the directions in which a layer's inputs vary most.

The paper's case: these directions explain most of the inputs' variance, a few batches find them,
and with them B receives the largest first gradient that an A with orthonormal rows can give it, if
the gradients of tokens are independent of the inputs. Each is measured on films that EVA has not
seen: an A that explains what it was made from explains it by construction.

Source: Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation",
arXiv 2410.07170, theorems 3.1 and 3.2, algorithm 1 (tau), and the table of the initialization's
time.

    variance    shares, overlaps: pure
    settings    what can be told
    inputs      explained variance, convergence, ranks
    gradients   the first gradient of B by method
    costs       seconds of a start beside those of a training step
    claims      what they say of the paper
    charts      tables and figures
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
import torch

from ..reproduction import Findings, Paper
from ..subject import DESCRIBED, short_name
from ..tasks import (
    described_data,
    load_with_task,
    measured_layers,
    sequence_count,
    task_batches,
)
from . import charts, claims
from .costs import measure_costs
from .discussion import discussed
from .gradients import measure_gradients
from .inputs import measure_inputs
from .settings import EvaVarianceSettings


@dataclass
class Rows:
    """Everything measured, with a column `model` in each."""

    explained: list[dict] = field(default_factory=list)
    convergence: list[dict] = field(default_factory=list)
    turning: list[dict] = field(default_factory=list)
    ranks: list[dict] = field(default_factory=list)
    gradients: list[dict] = field(default_factory=list)
    costs: list[dict] = field(default_factory=list)
    epoch: float = 0.0


def reproduce(settings: EvaVarianceSettings) -> Findings:
    """Measure every model, then what a start costs, and judge over all of them."""
    rows = Rows()
    for model in settings.models:
        measure(model, settings, rows)
    time_starts(settings, rows)
    return found_in(rows, settings)


def measure(model: str, settings: EvaVarianceSettings, rows: Rows) -> None:
    data = settings.data(model)
    subject = load_with_task(model, settings.device)
    layers = measured_layers(subject, data.every)
    own, fresh = (
        task_batches(
            subject, split, data.batches * data.batch_size, size=data.batch_size, length=data.length
        )
        for split in ("train", "test")
    )
    explained, converged, turned, ranks = measure_inputs(subject, layers, own, fresh, settings)
    gradients = measure_gradients(
        subject, layers, own, fresh[: data.gradient_batches], settings, data.moved
    )
    for total, found in (
        (rows.explained, explained),
        (rows.convergence, converged),
        (rows.turning, [{"size": data.batch_size, **row} for row in turned]),
        (rows.ranks, ranks),
        (rows.gradients, gradients),
    ):
        total += [{"model": subject.short, **row} for row in found]


def time_starts(settings: EvaVarianceSettings, rows: Rows) -> None:
    """With the calibration's sequences, in batches of `cost_batch`."""
    model = settings.cost_model
    data = settings.data(model)
    subject = load_with_task(model, settings.device)
    own = task_batches(
        subject, "train", data.batches * data.batch_size, size=settings.cost_batch,
        length=data.length,
    )  # fmt: skip
    epoch = sequence_count(subject, "train", length=data.length)
    layers = measured_layers(subject, settings.cost_every)
    rows.costs, rows.epoch = measure_costs(subject, layers, own, epoch, settings)


def found_in(rows: Rows, settings: EvaVarianceSettings) -> Findings:
    """From rows to findings."""
    explained, convergence, turning, ranks, gradients, costs = map(
        pd.DataFrame,
        (
            rows.explained, rows.convergence, rows.turning, rows.ranks, rows.gradients,
            rows.costs,
        ),
    )  # fmt: skip
    models = list(map(short_name, settings.models))
    return Findings(
        claims=[
            claims.explains(explained, settings.rank),
            claims.converges(turning),
            claims.same_elsewhere(convergence),
            claims.larger_than_random(gradients),
            claims.largest_of_all(gradients),
            claims.fewer_parameters(ranks, settings.rho),
            claims.cheap(rows.costs),
        ],
        setting=setting(gradients, rows, settings),
        tables=[
            charts.gradient_table(gradients),
            charts.variance_table(explained),
            charts.convergence_table(convergence, turning),
            charts.ranks_table(ranks),
            charts.costs_table(costs, short_name(settings.cost_model)),
        ],
        figures=[
            *(charts.variance_figure(explained, model) for model in models),
            charts.convergence_figure(convergence, settings.orders),
            *(charts.ranks_figure(ranks, model, settings.rank, settings.rho) for model in models),
            *(charts.gradients_figure(gradients, model) for model in models),
            charts.costs_figure(costs),
        ],
        discussion=discussed(gradients, ranks, convergence),
    )


def setting(gradients: pd.DataFrame, rows: Rows, settings: EvaVarianceSettings) -> dict[str, str]:
    told = {}
    for model in settings.models:
        data = settings.data(model)
        layers = gradients.loc[gradients["model"] == short_name(model), "layer"].nunique()
        told[short_name(model)] = (
            f"{DESCRIBED.get(model, model)}; "
            f"{described_data(model, size=data.batch_size, length=data.length)}; {data.batches} "
            f"batches, as many of other films, and {data.gradient_batches} of those for gradients; "
            f"directions and gradients of {layers} layers, ranks over all"
        )
    told["methods"] = (
        f"r = {settings.rank}, s = 1, the library’s options (eva: rho = 1 but for the ranks; "
        f"eva_uncentred: center = False; lora_one: gamma = 8 √r); seed {settings.seed}"
    )
    told["cost"] = (
        f"{short_name(settings.cost_model)}, batches of {settings.cost_batch}; an epoch is "
        f"{rows.epoch:.0f} s; wall clock of {torch.get_num_threads()} thread(s), beside whatever "
        "else the machine was doing"
    )
    told["the paper’s"] = "Llama-2-7B, Llama-3.1-8B and Gemma-2-9B on MetaMathQA and others"
    return told


PAPER = Paper(
    name="eva_variance",
    title="EVA: explained variance",
    source="Paischer et al. 2024, arXiv 2410.07170, theorems 3.1 and 3.2",
    question="Do a layer’s first input directions explain most of their variance, are they found "
    "in few batches, and do they give B the largest first gradient?",
    settings=EvaVarianceSettings,
    reproduce=reproduce,
)
