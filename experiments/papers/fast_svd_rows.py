"""The rows of the fast SVD: matrices decomposed by every method, and short fine-tunings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init import LoraConfig, get_peft_model, init_factors
from lora_init.progress import tracked

from ..benchmark.powerlaw import PowerLaw
from ..console import say
from ..errors import ConfigurationError
from .corpus import plot_blocks
from .fine_tuning import constant_training, fine_tune
from .language import block_losses
from .reproduction import (
    Measurement,
    Options,
    require,
    require_at_least,
)
from .subject import Subject, load_subject, place, timed

PAPER_SHARE = 128 / 4096
LOWRANK, NITER, PISSA = "torch.svd_lowrank", "pissa_niter_N", "pissa"
EXACT = "exact"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Pair = tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]
"""A and B of one decomposition, at s = 1."""


@dataclass
class FastSvdOptions(Options):
    """What is decomposed and trained.

    Attributes:
        model: a causal model, as `load_subject` takes it.
        blocks: so many blocks of the model, evenly spaced, are decomposed.
        synthetic: the side of a synthetic square matrix with s_i = i^-0.7; None leaves it out.
        ranks: measured in addition to the judged rank.
        share: the judged rank as a share of the width; the paper's is 128 / 4096.
        niters: subspace iterations; 1 and 16 among them.
        rounds: decompositions of each matrix, from different draws; times are medians.
        target_modules: decomposed, and adapted in training at the judged rank with alpha = r.
        adapted_every: one of so many blocks is adapted.
        starts: niter of the fine-tunings in addition to the exact one; 1 and 16 among them.
        draws: fine-tunings of each of these, from different random draws.
        steps, batch_size, length, learning_rate: of the fine-tunings on film plots.
        held_out: blocks of other plots, whose losses are compared after the training.
    """

    model: str = "smollm2"
    blocks: int = 1
    synthetic: int | None = 2048
    ranks: list[int] = field(default_factory=lambda: [128])
    share: float = PAPER_SHARE
    niters: list[int] = field(default_factory=lambda: [0, 1, 2, 4, 8, 16])
    rounds: int = 2
    target_modules: list[str] = field(default_factory=lambda: list(LINEAR))
    adapted_every: int = 1
    starts: list[int] = field(default_factory=lambda: [1, 16])
    draws: int = 2
    steps: int = 7
    batch_size: int = 2
    length: int = 64
    learning_rate: float = 2e-4
    held_out: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "blocks", "ranks", "rounds", "adapted_every", "draws")
        require_at_least(self, 1, "batch_size", "held_out")
        require_at_least(self, 2, "steps")
        large = self.synthetic is None or self.synthetic >= 64
        require(self, "synthetic", large, "an integer >= 64, or null")
        require(self, "share", 0 < self.share < 1, "a share of the width, 0 < share < 1")
        for name in ("niters", "starts"):
            given = getattr(self, name)
            ascending = given == sorted(set(given)) and min(given, default=0) >= 0
            complete = {1, 16} <= set(given)
            require(self, name, ascending and complete, "ascending integers >= 0 with 1 and 16")

    def judged_rank(self, width: int) -> int:
        return max(1, round(self.share * width))


# -- decompositions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Triplets:
    """All singular triplets of a matrix, values descending."""

    left: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "in k"]

    def leading(self, rank: int) -> Pair:
        return balanced(self.left[:, :rank], self.values[:rank], self.right[:, :rank])


def balanced(left: Tensor, values: Tensor, right: Tensor) -> Pair:
    """PiSSA's factors: A = sqrt(S) Vᵀ, B = U sqrt(S)."""
    root = values.sqrt()
    return root[:, None] * right.T, left * root


def full_svd(weight: Float[Tensor, "out in"]) -> Triplets:
    """The reference."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return Triplets(left, values, right.T)


def decompose(method: str, weight: Tensor, rank: int, niter: int | None, seed: int) -> Pair:
    """PiSSA's factors by one of the compared methods; `pissa` needs no niter."""
    if method == LOWRANK:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return balanced(*torch.svd_lowrank(weight, rank, niter=niter))
    name = PISSA if method == PISSA else f"pissa_niter_{niter}"
    found = init_factors(weight, name, r=rank, seed=seed)
    return found.lora_A, found.lora_B


@torch.no_grad()
def errors(found: Pair, exact: Pair, weight: Float[Tensor, "out in"]) -> dict[str, float]:
    """Four measures of the distance from the exact factors, defined in `fast_svd`."""
    product, best = (lora_B.double() @ lora_A.double() for lora_A, lora_B in (found, exact))
    optimum = float((weight.double() - best).norm())
    first, second = (torch.cat([A.T, B]).double() for A, B in (found, exact))
    signs = torch.where((first * second).sum(0) < 0, -1.0, 1.0)
    ranges = [torch.linalg.qr(lora_B.double())[0] for _, lora_B in (found, exact)]
    return {
        "difference": float((product - best).norm() / best.norm()),
        "excess": float((weight.double() - product).norm()) / optimum - 1,
        "entries": float((signs * first - second).abs().mean()),
        "overlap": float((ranges[0].T @ ranges[1]).square().sum() / exact[1].shape[1]),
    }


@dataclass(frozen=True)
class Matrix:
    """A matrix to decompose; `judged` is the rank with the paper's share of the width."""

    source: str
    layer: str
    weight: Tensor
    judged: int


def matrices(subject: Subject, options: FastSvdOptions) -> list[Matrix]:
    """The matrices of the chosen blocks, then the synthetic one.

    Raises:
        ConfigurationError: no layer is a target, or a rank exceeds the smaller side of a matrix.
    """
    device = place(options.device)
    count = 1 + max(layer.block for layer in subject.layers)
    judged = options.judged_rank(subject.model.config.hidden_size)
    found = [
        Matrix(subject.short, layer.name, weight.to(device), judged)
        for layer, weight in subject.weights(subject.every(max(1, count // options.blocks)))
        if layer.kind.rsplit(".", 1)[-1] in options.target_modules
    ]
    if not found:
        raise ConfigurationError(
            f"target_modules={options.target_modules} is not supported: must be names of linear "
            f"layers in {subject.name}."
        )
    side = options.synthetic
    if side is not None:
        name = f"synthetic {side} × {side}"
        weight = PowerLaw(side, side, "fast_svd", options.seed).weight(device)
        found.append(Matrix(name, name, weight, options.judged_rank(side)))
    for matrix in found:
        rank = max([matrix.judged, *options.ranks])
        if rank > min(matrix.weight.shape):
            shape = " × ".join(map(str, matrix.weight.shape))
            raise ConfigurationError(
                f"ranks={options.ranks} is not supported: rank {rank} exceeds {matrix.layer}, "
                f"{shape}. Lower ranks or share."
            )
    return found


def measure_decompositions(found: list[Matrix], options: FastSvdOptions) -> pd.DataFrame:
    """A row per matrix, round, rank, method and niter; the methods take turns."""
    full_svd(found[0].weight[:64, :64])  # the first calls load libraries
    for method in (LOWRANK, NITER, PISSA):
        decompose(method, found[0].weight, 1, options.niters[0], options.seed)
    turns = [(matrix, turn) for matrix in found for turn in range(options.rounds)]
    rows = [
        row
        for matrix, turn in tracked(turns, "decompositions")
        for row in decompositions(matrix, turn, options)
    ]
    return pd.DataFrame(rows)


def decompositions(matrix: Matrix, turn: int, options: FastSvdOptions) -> Iterator[dict[str, Any]]:
    """The rows of one matrix in one round."""
    weight = matrix.weight
    exact_seconds, triplets = timed(weight.device, lambda: full_svd(weight))
    seed = options.seed + turn
    for rank in sorted({*options.ranks, matrix.judged}):
        for method in (LOWRANK, NITER, PISSA):
            for niter in [None] if method == PISSA else options.niters:
                arguments = (method, weight, rank, niter, seed)
                seconds, pair = timed(weight.device, lambda a=arguments: decompose(*a))
                yield {
                    "source": matrix.source,
                    "layer": matrix.layer,
                    "round": turn,
                    "judged": rank == matrix.judged,
                    "rank": rank,
                    "method": method,
                    "niter": niter,
                    "seconds": seconds,
                    "exact_seconds": exact_seconds,
                    **errors(pair, triplets.leading(rank), weight),
                }


# -- fine-tunings ----------------------------------------------------------------------------------


def fine_tunings(subject: Subject, options: FastSvdOptions) -> dict[str, pd.DataFrame]:
    """Train from every start and draw, on the same blocks in the same order.

    "steps" has a row per step with its loss, "held_out" a row per block of unseen text with its
    loss after the last step.
    """
    count = options.steps * options.batch_size
    blocks = plot_blocks(subject.tokenizer, "train", count, options.length)
    unseen = plot_blocks(subject.tokenizer, "test", options.held_out, options.length)
    training = constant_training(options, options.learning_rate, max_grad_norm=1.0)
    steps, held_out = [], []
    planned = [(niter, draw) for niter in options.starts for draw in range(options.draws)]
    for niter, draw in [(None, 0), *planned]:
        name = EXACT if niter is None else f"niter {niter}"
        say(f"  fine-tuning from {name}" + ("" if niter is None else f", draw {draw + 1}"))
        model = start(subject, options, niter, options.seed + draw)
        trace = fine_tune(model, blocks, training, seed=options.seed, device=options.device)
        losses = block_losses(model, unseen).tolist()
        if niter is None:
            model.unload()
        case = {"start": name, "niter": niter, "draw": draw}
        steps += [{**case, "step": step, "loss": loss} for step, loss, _ in trace.steps()]
        held_out += [{**case, "block": n, "loss": loss} for n, loss in enumerate(losses)]
    return {"steps": pd.DataFrame(steps), "held_out": pd.DataFrame(held_out)}


def adapted(subject: Subject, options: FastSvdOptions) -> list[int]:
    """The numbers of the adapted blocks."""
    return sorted({layer.block for layer in subject.every(options.adapted_every)})


def start(subject: Subject, options: FastSvdOptions, niter: int | None, seed: int) -> nn.Module:
    """The model with PiSSA's factors: the exact ones, or PEFT's for a niter.

    PEFT gets a copy of the model, because it changes the base for good.

    Raises:
        ConfigurationError: PEFT is not installed.
    """
    rank = options.judged_rank(subject.model.config.hidden_size)
    shared = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": options.target_modules,
        "layers_to_transform": adapted(subject, options),
        "task_type": "CAUSAL_LM",
    }
    if niter is None:
        config = LoraConfig(**shared, init_lora_weights={"name": "pissa", "method": "gram"})
        return get_peft_model(subject.model, config, seed=options.seed, cache=False)
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            "starts is not supported without PEFT, which makes them. Run pip install peft==0.21.2."
        ) from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(**shared, init_lora_weights=f"pissa_niter_{niter}")
        return peft.get_peft_model(copy.deepcopy(subject.model), config)


def measure(options: FastSvdOptions) -> Measurement:
    """Decompose the matrices, then fine-tune."""
    subject = load_subject(options.model)
    found = matrices(subject, options)
    say(f"  decompositions of {len(found)} matrices in {options.rounds} rounds")
    frames = {"decompositions": measure_decompositions(found, options)}
    frames |= fine_tunings(subject, options)
    judged = {matrix.source: matrix.judged for matrix in found}
    ranks = ", ".join(f"{rank} on {source}" for source, rank in judged.items())
    facts = {
        "model": subject.described,
        "judged at": f"r = {ranks}: the paper’s share of the width",
        "times": "every decomposition in turns with the full SVD, in one process; other work "
        "may have run on the machine’s other cores, so that ratios can be read and seconds not",
        "training": "film plots, constant rate, alpha = r; starts with niter by PEFT "
        "(torch.svd_lowrank, q = r); losses of unseen plots",
        "the paper’s": "Llama-2-7B, r = 128, MetaMathQA; errors of the attention’s matrices",
    }
    return Measurement(options, frames, facts)
