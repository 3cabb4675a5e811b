"""Rank allocation: how many directions each layer gets out of one budget.

Runs between statistics and initializers, because it must see all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.layer import LayerStatistics


@dataclass(frozen=True)
class LayerRequest:
    """What an allocator knows of a layer.

    Attributes:
        rank: the planned one.
        shape: (out, in).
        statistics: what its method asked for.
        weight: reads the original weight, (out, in), whole; for one layer at a time.
    """

    rank: int
    shape: tuple[int, int]
    statistics: LayerStatistics
    weight: Callable[[], Float[Tensor, "out in"]]


def redistribute(
    spectra: Mapping[str, Float[Tensor, " candidates"]], budget: int
) -> dict[str, int]:
    """Give each layer as many ranks as it has values among the `budget` largest of all layers.

    Args:
        spectra: per layer, comparable scores in descending order (explained-variance ratios, say).
            A layer's rank can grow to the length of its spectrum; zeros are never chosen.
        budget: the sum of all ranks.

    Returns:
        One rank per layer, in the order of `spectra`, possibly 0. They sum to the budget unless
        fewer than that many scores are positive. Ties go to the earlier layer.
    """
    names = list(spectra)
    scores = torch.cat([spectra[name].double().cpu() for name in names])
    lengths = torch.tensor([len(spectra[name]) for name in names], device="cpu")
    owners = torch.arange(len(names), device="cpu").repeat_interleave(lengths)
    order = torch.sort(scores, descending=True, stable=True).indices[:budget]
    chosen = owners[order[scores[order] > 0]]
    counts = torch.bincount(chosen, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def redistribute_by_cost(
    spectra: Mapping[str, Float[Tensor, " candidates"]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Give out ranks by score per cost, as long as the sum of costs stays within the budget.

    Greedy: the best ratio that still fits comes next. A layer's scores fall and its ranks cost the
    same, so that it is always given its first directions. What is left over is less than a rank of
    the cheapest layer that could still grow.

    Args:
        spectra: as of `redistribute`.
        costs: of one rank of each layer (parameters, say).
        budget: the sum of all ranks' costs, at most.

    Returns:
        One rank per layer, in the order of `spectra`, possibly 0. Ties go to the earlier layer.
    """
    pool = [
        (score / costs[name], name)
        for name, scores in spectra.items()
        for score in scores.tolist()  # one copy from a device, not one for each score
        if score > 0
    ]
    pool.sort(key=lambda entry: entry[0], reverse=True)  # stable: ties stay in order
    ranks = dict.fromkeys(spectra, 0)
    for _, name in pool:
        if costs[name] <= budget:
            budget -= costs[name]
            ranks[name] += 1
    return ranks
