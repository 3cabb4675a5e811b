"""Errors of quantized layers with PiSSA's and LoftQ's adapters, by rank and T.

    reduction = 100 (1 - ‖W - (Q + s B A)‖ / ‖W - nf4(W)‖)    in percent

The norm is the nuclear norm (the paper's), the Frobenius norm, the spectral norm, or the root mean
square of the layer's output error on real inputs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import LoraConfig, calibrate, init_factors
from lora_init.layer import layer_generator
from lora_init.progress import tracked
from lora_init.quantization import Quantizer

from ..console import say
from ..errors import ConfigurationError
from . import pissa_quantization_grids as grids
from .corpus import joined_blocks, language_batches, load_texts, sentence_batches
from .reproduction import Measurement, Options, require, require_at_least
from .subject import Layer, Subject, load_subject, place

METHODS = {"loftq": ("loftq", "loftq_iter"), "pissa": ("qpissa", "iterations")}
"""By name in the paper: the initializer, and its option that holds T."""
NORMS = ("nuclear", "frobenius", "spectral", "output")
AS_IT_IS = "as it is"
ROUNDED, NOISY, DITHERED = "on a 4-bit grid", "with noise of that size", "off its 4-bit grid"
SENTENCE_TOKENS = 20
"""Fewer than most reviews have."""
NOISE_POINTS = 20_000
PARTS = {
    "Q": ((4096, 4096), 8.1, 19.0),
    "K": ((4096, 4096), 8.1, 18.1),
    "V": ((4096, 4096), 7.2, 8.9),
    "O": ((4096, 4096), 7.3, 8.9),
    "gate": ((11008, 4096), 5.3, 8.2),
    "up": ((11008, 4096), 5.1, 5.9),
    "down": ((4096, 11008), 5.1, 6.0),
}
"""Llama-2-7B, r = 128, T = 1: shape, LoftQ, PiSSA."""

PARTS = {
    "Q": r"q_proj|query",
    "K": r"k_proj|key",
    "V": r"v_proj|value",
    "O": r"o_proj|attention\.output\.dense",
    "gate": r"gate_proj",
    "up": r"up_proj|intermediate\.dense",
    "down": r"down_proj|output\.dense",
}
"""The paper's names of a block's layers, and those of the models; the first that fits counts."""


def part_of(kind: str) -> str:
    """The paper's name of a kind of layer; the model's own where the paper has none."""
    return next((part for part, names in PARTS.items() if re.search(names, kind)), kind)


@dataclass
class PissaQuantizationOptions(Options):
    """What is measured.

    Attributes:
        models: as `load_subject` takes them.
        blocks: the number of evenly spaced blocks of each model, or a few more if they do not
            divide; None means all. All claims are judged on them, at one rank.
        detailed: so many of these blocks are also measured at the other ranks and in the controls.
        ranks: measured in addition to the rank that is judged.
        share: the judged rank as a share of the model's width; the paper's is 128 / 4096.
        iterations: T.
        tokens, length: of the calibration text: film plots, or reviews for an encoder.
        controls: also measure weights that were put on a 4-bit grid, or taken off their grid.
    """

    models: list[str] = field(default_factory=lambda: ["minilm", "smollm2"])
    blocks: int | None = 6
    detailed: int = 2
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128])
    share: float = 128 / 4096
    iterations: list[int] = field(default_factory=lambda: [1, 5])
    tokens: int = 4096
    length: int = 128
    controls: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "models", bool(self.models), "one model or more")
        fits = self.blocks is None or self.blocks >= 1
        require(self, "blocks", fits, "an integer >= 1, or null")
        require_at_least(self, 1, "detailed")
        require(self, "ranks", min(self.ranks, default=0) >= 1, "one or more ranks >= 1")
        require(self, "share", 0 < self.share < 1, "a share 0 < x < 1 of the width")
        ascending = all(one < next_one for one, next_one in pairwise(self.iterations))
        several = len(self.iterations) > 1 and self.iterations[0] >= 1
        require(self, "iterations", several and ascending, "two or more T >= 1, ascending")

    def judged_rank(self, width: int) -> int:
        """The rank that claims are judged at, for a model of this width."""
        return max(1, round(self.share * width))


def measure(options: PissaQuantizationOptions) -> Measurement:
    """Measure the error of each layer by method, rank and T; one frame has the models."""
    rows, models, described = [], [], []
    for name in options.models:
        subject = load_subject(name)
        layers = chosen_layers(subject, options.blocks)
        blocks = sorted({layer.block for layer in layers})
        say(f"  {name}: {len(layers)} layers of {len(blocks)} blocks")
        width = subject.model.config.hidden_size
        judged = options.judged_rank(width)
        models.append({"model": subject.short, "width": width, "judged": judged})
        numbers = ", ".join(map(str, blocks))
        described.append(f"{subject.described}; {len(layers)} layers: blocks {numbers}")
        rows += [{"model": subject.short} | row for row in rows_of_model(subject, layers, options)]
    ranks = ", ".join(f"{model['judged']} on {model['model']}" for model in models)
    facts = {
        "models": ". ".join(described),
        "judged at": f"r = {ranks}: the paper’s share of the width",
        "quantizer": "NF4 in blocks of 64, of the library (bitsandbytes’ values to the bit)",
        "inputs": "for the output error only: film plots, or film reviews for MiniLM",
        "the paper’s": "Llama-2-7B, r = 128, and Llama-3-8B, r = 64; nuclear norm, all layers",
    }
    frames = {"errors": pd.DataFrame(rows), "models": pd.DataFrame(models)}
    return Measurement(options, frames, facts)


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


def rows_of_model(
    subject: Subject, layers: Sequence[Layer], options: PissaQuantizationOptions
) -> list[dict[str, Any]]:
    """All rows of one model.

    Raises:
        ConfigurationError: a rank is above a layer's smaller side.
    """
    judged = options.judged_rank(subject.model.config.hidden_size)
    ranks = sorted({*options.ranks, judged})
    for layer, weight in subject.weights(layers):
        if ranks[-1] > min(weight.shape):
            raise ConfigurationError(
                f"ranks={options.ranks}: rank {ranks[-1]} exceeds {layer.name} of "
                f"{subject.name}, {weight.shape[0]} × {weight.shape[1]}; lower ranks or share"
            )
    device = place(options.device)
    moments = second_moments(subject, layers, options)
    detailed = detailed_blocks(layers, options.detailed)
    rows = []
    for layer in tracked(list(layers), f"layers of {subject.name}"):
        in_detail = layer.block in detailed
        case = Case(
            layer=layer,
            weight=subject.weight(layer).to(device),
            moment=moments[layer.name].to(device),
            ranks=ranks if in_detail else [judged],
            judged=judged,
            detailed=in_detail,
        )
        rows += rows_of(case, options)
    return rows


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
            "error": 100 * plain["frobenius"] / norm,
            "noise": 100 * leading_share(*shape, rank),
            "smaller": 100 * (1 - float(squares[rank:].sum().sqrt()) / norm),
        }  # fmt: skip
        for method, (initializer, option) in METHODS.items():
            for count in options.iterations:
                left = remaining_error(
                    weight, initializer, rank, layer_generator(options.seed, layer.name),
                    **{option: count},
                )  # fmt: skip
                found = norms_of(left, moment)
                reductions = {name: 100 * (1 - found[name] / plain[name]) for name in found}
                rows.append({**common, "method": method, "T": count, **reductions})
    return rows


@torch.no_grad()
def norms_of(
    error: Float[Tensor, "out in"], moment: Float[Tensor, "in in"] | None = None
) -> dict[str, float]:
    """The norms of an error E in float64: of its singular values, and sqrt(tr(E R Eᵀ)).

    Squares of singular values come from the smaller Gram matrix. This costs values below 1e-8 of
    the largest their digits. Errors of a quantizer have no such values.

    Args:
        moment: the second moment R of the inputs; None leaves the output error out.
    """
    error = error.double()
    squares = squared_values(error)
    values = squares.sqrt()
    found = {
        "nuclear": float(values.sum()),
        "frobenius": float(squares.sum().sqrt()),
        "spectral": float(values[0]),
    }
    if moment is not None:
        output = ((error @ moment.double()) * error).sum().clamp_min(0).sqrt()
        found["output"] = float(output)
    return found


def squared_values(matrix: Float[Tensor, "out in"]) -> Float[Tensor, " k"]:
    """The squares of its singular values, descending, in float64."""
    matrix = matrix.double()
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(tall.T @ tall).clamp_min(0).flip(0)


def plain_error(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """W - nf4(W), blocks of 64: what both methods are compared with."""
    return weight.double() - Quantizer().roundtrip(weight).double()


@torch.no_grad()
def remaining_error(
    weight: Float[Tensor, "out in"],
    method: str,
    rank: int,
    generator: torch.Generator,
    **options: int,
) -> Float[Tensor, "out in"]:
    """W - (Q + s B A), float64, of a registered initializer that replaces the base; s = 1.

    Args:
        options: of the method, e.g. its number of iterations.
    """
    seed = generator.initial_seed()
    factors = init_factors(weight, {"name": method, **options}, r=rank, seed=seed)
    base = factors.replacement.base(weight, 1.0).double()
    return weight.double() - base - factors.lora_B.double() @ factors.lora_A.double()


def leading_share(rows: int, columns: int, rank: int) -> float:
    """The share of the nuclear norm that the top `rank` singular values of noise make up.

    The squared singular values of an m × n matrix (m >= n) of independent entries of variance 1/m
    follow Marchenko and Pastur's law with y = n / m. With the square written as
    l(θ) = 1 + y + 2 sqrt(y) cos θ, 0 <= θ <= π, the largest at θ = 0, its density is
    2 sin²θ / (π l(θ)) dθ: smooth, so that midpoints integrate it.

    Raises:
        ValueError: the rank is not within 1 … min(rows, columns).
    """
    small, large = sorted((rows, columns))
    if not 1 <= rank <= small:
        raise ValueError(
            f"rank={rank} is not supported: must be 1 to {small} for {rows} × {columns}"
        )
    y = small / large
    angles = (np.arange(NOISE_POINTS) + 0.5) * (np.pi / NOISE_POINTS)
    squares = 1 + y + 2 * np.sqrt(y) * np.cos(angles)
    density = 2 * np.sin(angles) ** 2 / (np.pi * squares) * (np.pi / NOISE_POINTS)
    counted = np.cumsum(density) / density.sum()
    held = np.cumsum(density * np.sqrt(squares))
    return float(np.interp(rank / small, counted, held) / held[-1])
