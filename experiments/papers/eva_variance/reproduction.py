"""The way from an encoder and a language model to the claims about EVA."""

from __future__ import annotations

import pandas as pd
import torch

from ..claim import Claim
from ..reproduction import Figure, Measurement, Reproduction, Table
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
from .options import EvaVarianceOptions

Rows = dict[str, list[dict]]


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
    """Models, data and methods in words."""
    found = {}
    for model in options.models:
        data = options.data(model)
        layers = gradients.loc[gradients["model"] == short_name(model), "layer"].nunique()
        found[short_name(model)] = (
            f"{DESCRIBED.get(model, model)}; "
            f"{described_data(model, size=data.batch_size, length=data.length)}; {data.batches} "
            f"batches, as many of other films, and {data.gradient_batches} of those for gradients; "
            f"directions and gradients of {layers} layers, ranks over all"
        )
    found["methods"] = (
        f"r = {options.rank}, s = 1, the library’s options (eva: rho = 1 except for the ranks; "
        f"eva_uncentred: center = False; lora_one: gamma = 8 √r); seed {options.seed}"
    )
    found["cost"] = (
        f"{short_name(options.cost_model)}, batches of {options.cost_batch}; an epoch is "
        f"{epoch:.0f} s; wall clock of {torch.get_num_threads()} thread(s) on a shared machine"
    )
    found["the paper’s"] = "Llama-2-7B, Llama-3.1-8B and Gemma-2-9B on MetaMathQA and others"
    return found


def judge_all(measured: Measurement) -> list[Claim]:
    """Three claims on inputs, two on gradients, one on ranks and one on cost."""
    options, gradients = measured.options, measured["gradients"]
    return [
        claims.explains(measured["explained"], options.rank),
        claims.converges(measured["turning"]),
        claims.same_elsewhere(measured["convergence"]),
        claims.larger_than_random(gradients),
        claims.largest_of_all(gradients),
        claims.fewer_parameters(measured["ranks"], options.rho),
        claims.cheap(measured["costs"].to_dict("records")),
    ]


def tabulate(measured: Measurement) -> list[Table]:
    """Gradients, variance, convergence, ranks and costs."""
    return [
        charts.gradient_table(measured["gradients"]),
        charts.variance_table(measured["explained"]),
        charts.convergence_table(measured["convergence"], measured["turning"]),
        charts.ranks_table(measured["ranks"]),
        charts.costs_table(measured["costs"], short_name(measured.options.cost_model)),
    ]


def draw(measured: Measurement) -> list[Figure]:
    """The same by model."""
    options = measured.options
    models = list(map(short_name, options.models))
    ranks = measured["ranks"]
    return [
        *(charts.variance_figure(measured["explained"], model) for model in models),
        charts.convergence_figure(measured["convergence"], options.orders),
        *(charts.ranks_figure(ranks, model, options.rank, options.rho) for model in models),
        *(charts.gradients_figure(measured["gradients"], model) for model in models),
        charts.costs_figure(measured["costs"]),
    ]


def discuss(measured: Measurement) -> list[str]:
    """Check the theorem's assumption, and describe orders and ranks."""
    return discussed(measured["gradients"], measured["ranks"], measured["convergence"])


REPRODUCTION = Reproduction(
    name="eva_variance",
    title="EVA: explained variance",
    source="Paischer et al. 2024, arXiv 2410.07170, theorems 3.1 and 3.2",
    question="Do a layer’s first input directions explain most of their variance, are they found "
    "in few batches, and do they give B the largest first gradient?",
    options=EvaVarianceOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
    discuss=discuss,
)
