"""Layers -> rows: one of each layer, variant of its weight, rank, method and number of iterations.

Columns: model, part, block, detailed (whether the block is one of those that are measured at every
rank and in the controls), out, in, variant, rank, method, T; the reductions nuclear, frobenius,
spectral and output (percent; output for the weights as they are); `error`, ‖W - nf4(W)‖ / ‖W‖ in
percent; `noise`, the reduction that the top r directions of white noise would give; `smaller`,
100 (1 - ‖W - SVD_r(W)‖ / ‖W‖), by how much QPiSSA's first step makes smaller what is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_init import LoraConfig, calibrate
from lora_init.layer import layer_generator
from lora_init.progress import tracking

from ...errors import ConfigurationError
from ..corpus import (
    joined_blocks,
    language_batches,
    load_texts,
    sentence_batches,
)
from ..subject import Layer, Subject, place
from . import grids
from .errors import (
    norms_of,
    plain_error,
    remaining_error,
    squared_values,
)
from .options import (
    METHODS,
    SHOWN,
    PissaQuantizationOptions,
    part_of,
)
from .white_noise import leading_share

AS_IT_IS = "as it is"
ROUNDED, NOISY, DITHERED = "on a 4-bit grid", "with noise of that size", "off its 4-bit grid"
SENTENCE_TOKENS = 20  # a review's, rather fewer than more


@dataclass(frozen=True)
class Case:
    """A layer with all that its rows are made from."""

    layer: Layer
    weight: Tensor
    moment: Tensor
    ranks: Sequence[int]
    judged: int
    detailed: bool


def chosen_layers(subject: Subject, blocks: int | None) -> list[Layer]:
    count = 1 + max(layer.block for layer in subject.layers)
    return subject.every(1 if blocks is None else max(1, count // blocks))


def detailed_blocks(layers: Sequence[Layer], count: int) -> set[int]:
    """So many of the layers' blocks, evenly spaced."""
    blocks = sorted({layer.block for layer in layers})
    step = max(1, len(blocks) // count)
    return set(blocks[step // 2 :: step])


def width_of(subject: Subject) -> int:
    return subject.model.config.hidden_size


def second_moments(
    subject: Subject, layers: Sequence[Layer], options: PissaQuantizationOptions
) -> dict[str, Tensor]:
    """Of the layers' inputs, by name: on film plots, or on reviews where sentences are embedded."""
    if subject.model.config.model_type == "bert":
        texts = load_texts("reviews", limit=max(1, options.tokens // SENTENCE_TOKENS))
        batches = sentence_batches(subject.tokenizer, texts, length=options.length, size=32)
    else:
        blocks = joined_blocks(
            subject.tokenizer, load_texts("plots"), length=options.length, tokens=options.tokens
        )
        batches = language_batches(blocks, 8)
    config = LoraConfig(
        r=1, target_modules=[layer.name for layer in layers], init_lora_weights="qera"
    )
    found = calibrate(subject.model, config, batches)
    return {layer.name: found.layers[layer.name].inputs.second_moment for layer in layers}


def rows_of_model(subject: Subject, options: PissaQuantizationOptions) -> list[dict[str, Any]]:
    """All rows of one model.

    Raises:
        ConfigurationError: a rank above a layer's smaller side.
    """
    layers = chosen_layers(subject, options.blocks)
    judged = options.judged_rank(width_of(subject))
    ranks = sorted({*options.ranks, judged})
    for layer in layers:
        shape = tuple(subject.weight(layer).shape)
        if ranks[-1] > min(shape):
            raise ConfigurationError(
                f"ranks={options.ranks}: rank {ranks[-1]} exceeds {layer.name} of "
                f"{subject.name}, {shape[0]} × {shape[1]}; lower ranks or share"
            )
    device = place(options.device)
    moments = second_moments(subject, layers, options)
    detailed = detailed_blocks(layers, options.detailed)
    cases = [
        Case(
            layer, weight.to(device), moments[layer.name].to(device),
            ranks if layer.block in detailed else [judged], judged, layer.block in detailed,
        )
        for layer, weight in subject.weights(layers)
    ]  # fmt: skip
    rows = []
    with tracking(len(cases), f"layers of {subject.name}") as advance:
        for found in _a_core_each(cases, options, device):
            rows += [{"model": subject.name, **row} for row in found]
            advance(1)
    return rows


def _a_core_each(
    cases: list[Case], options: PissaQuantizationOptions, device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """Matrices this small keep one core busy each, and two cores by halves."""
    threads = torch.get_num_threads()
    workers = threads if device.type == "cpu" else 1
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield from pool.map(lambda case: rows_of(case, options), cases)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def rows_of(case: Case, options: PissaQuantizationOptions) -> list[dict[str, Any]]:
    """One layer's: at its ranks as it is; in detail, at the judged one in the other variants."""
    rows = rows_of_weight(case, case.weight, AS_IT_IS, case.ranks, options)
    if options.controls and case.detailed:
        generator = layer_generator(options.seed, f"variant of {case.layer.name}")
        for name, weight in variants(case.weight, generator).items():
            rows += rows_of_weight(case, weight, name, [case.judged], options)
    return rows


def variants(weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The controls that suit a weight."""
    if weight.shape[1] % grids.RUN:
        return {}
    if grids.on_grid(weight):
        return {DITHERED: grids.dithered(weight, generator)}
    return {ROUNDED: grids.rounded(weight), NOISY: grids.noisy(weight, generator)}


def rows_of_weight(
    case: Case,
    weight: Tensor,
    variant: str,
    ranks: Sequence[int],
    options: PissaQuantizationOptions,
) -> list[dict[str, Any]]:
    layer, shape = case.layer, tuple(weight.shape)
    moment = case.moment if variant == AS_IT_IS else None
    plain = norms_of(plain_error(weight), moment)
    squares = squared_values(weight)
    norm = float(squares.sum().sqrt())
    rows = []
    for rank in ranks:
        common = {
            "part": part_of(layer.kind), "block": layer.block, "detailed": case.detailed,
            "out": shape[0], "in": shape[1], "variant": variant, "rank": rank,
            "error": 100 * plain.frobenius / norm,
            "noise": 100 * leading_share(*shape, rank),
            "smaller": 100 * (1 - float(squares[rank:].sum().sqrt()) / norm),
        }  # fmt: skip
        for method, option in METHODS.items():
            for count in options.iterations:
                generator = layer_generator(options.seed, layer.name)
                left = remaining_error(weight, method, rank, generator, **{option: count})
                reductions = norms_of(left, moment).reductions(plain)
                rows.append({**common, "method": SHOWN[method], "T": count, **reductions})
    return rows
