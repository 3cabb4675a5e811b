"""All starts of one model, measured: by layer, by model, and LoftQ's path by iteration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor

from lora_init import Calibration, LoraConfig, calibrate

from ...console import say
from ..corpus import (
    joined_blocks,
    language_batches,
    load_texts,
    sentence_batches,
)
from ..language import spread
from ..subject import Layer, load_subject, place
from .errors import (
    mean_square_output,
    relative_norm,
    remaining,
    second_moments,
)
from .options import LoftqIterationsOptions
from .outputs import HiddenStates, Measure, NextTokens
from .starts import LOFTQ, Ground, Start, starts

BATCH = 16
Item = TypeVar("Item")


@dataclass(frozen=True)
class Study:
    """One model, its data, and how its errors are measured.

    Attributes:
        measured: the targets whose own errors are measured.
        held_out: of the layers' inputs on data that no method has seen.
        measure: the whole model's error on the same data.
    """

    ground: Ground
    measured: list[Layer]
    held_out: Calibration
    measure: Measure


@dataclass(frozen=True)
class Frames:
    """What was measured.

    Attributes:
        layers: a row a start and layer; `seen` is the output error on the inputs of calibration.
        models: a row a start: means over the layers, the model's error, its perplexity.
        paths: a row an iteration and layer of LoftQ's longest alternation: the weight's error.
        texts: a row a start and held-out sentence or block: the model's error on it, and its loss,
            NaN for an encoder.
    """

    layers: pd.DataFrame
    models: pd.DataFrame
    paths: pd.DataFrame
    texts: pd.DataFrame


def encoder_study(options: LoftqIterationsOptions) -> Study:
    """An encoder on film reviews."""
    subject = load_subject(options.encoder, task_type="SEQ_CLS")
    counts = {"train": options.sentences, "test": options.held_out_sentences}
    seen, held_out = (
        sentence_batches(
            subject.tokenizer, at_equal_distances(load_texts("reviews", split), count),
            length=options.sentence_length, size=BATCH,
        )
        for split, count in counts.items()
    )  # fmt: skip
    every = options.encoder_every
    return study(subject, every, every, seen, held_out, HiddenStates, held_out, options)


def language_study(options: LoftqIterationsOptions) -> Study:
    """A language model on film plots."""
    subject = load_subject(options.language_model)
    seen, held_out = (
        joined_blocks(
            subject.tokenizer, load_texts("plots", split), length=options.block_length,
            tokens=tokens,
        )
        for split, tokens in (("train", options.tokens), ("test", options.held_out_tokens))
    )  # fmt: skip
    return study(
        subject, options.language_every, options.measured_every, language_batches(seen, 4),
        language_batches(held_out, 4), NextTokens, held_out, options,
    )  # fmt: skip


def at_equal_distances(items: Sequence[Item], count: int) -> list[Item]:
    """So many of them, by the rule of `spread`: neighbors are reviews of one film."""
    chosen = spread(torch.arange(len(items))[:, None], count)
    return [items[index] for index in chosen[:, 0].tolist()]


def study(subject, every, measured_every, seen, held_out, measure, measured_on, options) -> Study:
    """Move everything to its device, and look at the inputs of all layers."""
    device = place(options.device)
    subject.model.to(device)
    targets = subject.every(every)
    names = {layer.name for layer in targets}
    measured = [layer for layer in subject.every(measured_every) if layer.name in names]
    config = LoraConfig(r=1, target_modules=sorted(names), init_lora_weights="qera")
    narrow = LoraConfig(
        r=1, target_modules=[layer.name for layer in measured], init_lora_weights="qera"
    )
    ground = Ground(
        subject, targets,
        weights={layer.name: subject.weight(layer).clone() for layer in targets},
        calibration=calibrate(subject.model, config, seen),
        seed=options.seed,
    )  # fmt: skip
    return Study(
        ground, measured,
        held_out=calibrate(subject.model, narrow, held_out),
        measure=measure(subject.model, moved(measured_on, device)),
    )  # fmt: skip


def moved(data, device: torch.device):
    if isinstance(data, Tensor):
        return data.to(device)
    return [{name: value.to(device) for name, value in batch.items()} for batch in data]


def measure_starts(
    found: Study,
    cases: Iterable[tuple[int, int]],
    iterations: list[int],
    order_iterations: list[int],
    *,
    closed_form_last: bool,
) -> Frames:
    """Every start at every case, a number of bits and a rank."""
    ground = found.ground
    names = [layer.name for layer in found.measured]
    moments = {
        "output": second_moments(found.held_out, names),
        "seen": second_moments(ground.calibration, names),
    }
    whole = {
        inputs: {
            name: mean_square_output(ground.weights[name], moments[inputs][name]) for name in names
        }
        for inputs in moments
    }
    layers, models, paths, texts = [], [], [], []
    for bits, rank in cases:
        say(f"  {ground.subject.name}: {bits} bits, rank {rank}")
        for start in starts(
            ground, bits, rank, iterations, order_iterations,
            closed_form_last=closed_form_last,
        ):  # fmt: skip
            case = {
                "model": ground.subject.short, "bits": bits, "rank": rank,
                "method": start.method, "T": start.iterations,
            }  # fmt: skip
            rows = layer_rows(found, start, moments, whole)
            layers += [case | row for row in rows]
            apart = found.measure(start.model)
            means = pd.DataFrame(rows)[["weight", "output", "seen"]].mean()
            models.append(
                case | means.to_dict() | {"error": apart.error, "perplexity": apart.perplexity}
            )
            losses = apart.losses or [float("nan")] * len(apart.texts)
            texts += [
                case | {"text": number, "error": error, "loss": loss}
                for number, (error, loss) in enumerate(zip(apart.texts, losses, strict=True))
            ]
            if start.method == LOFTQ and start.iterations == max(iterations):
                paths += [case | row for row in path_rows(start)]
    return Frames(*map(pd.DataFrame, (layers, models, paths, texts)))


def layer_rows(found: Study, start: Start, moments: dict, whole: dict) -> list[dict]:
    rows = []
    for layer in found.measured:
        weight = found.ground.weights[layer.name]
        left = remaining(start.model.layers[layer.name], weight)
        row = {"layer": layer.name, "kind": layer.kind, "weight": relative_norm(left, weight)}
        for inputs, by_layer in moments.items():
            square = mean_square_output(left, by_layer[layer.name]) / whole[inputs][layer.name]
            row[inputs] = max(square, 0.0) ** 0.5
        rows.append(row)
    return rows


def path_rows(start: Start) -> list[dict]:
    """The weight's error after each iteration, as LoftQ itself reports it."""
    return [
        {"layer": layer.name, "iteration": number, "weight": error}
        for layer in start.model.init_report().layers
        for number, error in enumerate(layer.details["error_by_iteration"], start=1)
    ]
