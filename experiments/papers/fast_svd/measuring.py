"""Matrices -> rows: one of each matrix, round, rank, contender and niter.

Columns: source, layer, round, judged (whether the rank has the paper's share of the width), rank,
method, niter (missing for `pissa`, which needs none), seconds, exact_seconds of the full SVD in the
same round, and the measures of `errors`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from experiments.benchmark.powerlaw import PowerLaw
from experiments.errors import ConfigurationError
from experiments.papers.fast_svd.decomposing import CONTENDERS, PISSA, exact
from experiments.papers.fast_svd.errors import errors_of
from experiments.papers.fast_svd.settings import FastSvdSettings
from experiments.papers.subject import Subject, place
from lora_init.progress import tracked

Result = TypeVar("Result")


@dataclass(frozen=True)
class Matrix:
    """One to decompose.

    Attributes:
        source: the model, or the synthetic one's name.
        judged: the rank that has the paper's share of the width.
    """

    source: str
    layer: str
    weight: Tensor
    judged: int


def synthetic_name(side: int) -> str:
    return f"synthetic {side} × {side}"


def matrices(subject: Subject, settings: FastSvdSettings) -> list[Matrix]:
    """Those of the chosen blocks, then the synthetic one.

    Raises:
        ConfigurationError: a rank above a matrix's smaller side.
    """
    device = place(settings.device)
    count = 1 + max(layer.block for layer in subject.layers)
    layers = subject.every(max(1, count // settings.blocks))
    judged = settings.judged_rank(subject.model.config.hidden_size)
    found = [
        Matrix(subject.short, layer.name, weight.to(device), judged)
        for layer, weight in subject.weights(layers)
        if layer.kind.rsplit(".", 1)[-1] in settings.target_modules
    ]
    if not found:
        raise ConfigurationError(
            f"target_modules={settings.target_modules}: {subject.name} has no such layers"
        )
    if settings.synthetic is not None:
        side = settings.synthetic
        weight = PowerLaw(side, side, "fast_svd", settings.seed).weight(device)
        name = synthetic_name(side)
        found.append(Matrix(name, name, weight, settings.judged_rank(side)))
    for matrix in found:
        rank = max([matrix.judged, *settings.ranks])
        if rank > min(matrix.weight.shape):
            raise ConfigurationError(
                f"ranks={settings.ranks}: rank {rank} exceeds {matrix.layer}, "
                f"{' × '.join(map(str, matrix.weight.shape))}; lower ranks or share"
            )
    return found


def measure(found: list[Matrix], settings: FastSvdSettings) -> list[dict[str, Any]]:
    """All rows; the contenders take turns on every matrix, in every round."""
    warm_up(found[0].weight, settings)
    turns = [(matrix, turn) for matrix in found for turn in range(settings.rounds)]
    return [
        row
        for matrix, turn in tracked(turns, "decompositions")
        for row in rows_of(matrix, turn, settings)
    ]


def warm_up(weight: Tensor, settings: FastSvdSettings) -> None:
    """What a first call loads counts for nobody."""
    exact(weight[:64, :64])
    for decompose in CONTENDERS.values():
        decompose(weight, 1, settings.niters[0], settings.seed)


def rows_of(matrix: Matrix, turn: int, settings: FastSvdSettings) -> Iterator[dict[str, Any]]:
    """One matrix in one round."""
    weight = matrix.weight
    exact_seconds, triplets = timed(lambda: exact(weight), weight.device)
    seed = settings.seed + turn
    for rank in sorted({*settings.ranks, matrix.judged}):
        best = triplets.leading(rank)
        for method, decompose in CONTENDERS.items():
            for niter in [None] if method == PISSA else settings.niters:
                seconds, pair = timed(
                    lambda d=decompose, r=rank, n=niter: d(weight, r, n, seed), weight.device
                )
                yield {
                    "source": matrix.source, "layer": matrix.layer, "round": turn,
                    "judged": rank == matrix.judged, "rank": rank, "method": method,
                    "niter": niter, "seconds": seconds, "exact_seconds": exact_seconds,
                    **asdict(errors_of(pair, best, weight)),
                }  # fmt: skip


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds and result, the device's queue empty before and after."""
    _synchronize(device)
    began = time.perf_counter()
    result = work()
    _synchronize(device)
    return time.perf_counter() - began, result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
