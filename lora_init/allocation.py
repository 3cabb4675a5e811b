"""Rank allocation: how many directions each layer gets out of one budget.

Runs between statistics and initializers, because it must see all layers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.statistics import LayerStatistics


@dataclass(frozen=True)
class LayerRequest:
    """What an allocator knows of a layer: its planned rank, (out, in), and its statistics."""

    rank: int
    shape: tuple[int, int]
    statistics: LayerStatistics


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
    owners = torch.cat([torch.full((len(spectra[n]),), i) for i, n in enumerate(names)])
    order = torch.sort(scores, descending=True, stable=True).indices[:budget]
    chosen = owners[order[scores[order] > 0]]
    counts = torch.bincount(chosen, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}
