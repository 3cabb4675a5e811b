"""Rank allocation: distribute a budget of ranks over the layers by their scores.

It runs after the calibration and before the initializers: it needs the scores of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def redistribute(
    spectra: Mapping[str, Float[Tensor, " candidates"]], budget: int
) -> dict[str, int]:
    """Set each layer's rank to the number of its scores among the `budget` largest of all layers.

    Args:
        spectra: per layer, scores in descending order that are comparable between layers, for
            example explained-variance ratios. The length of a layer's spectrum limits its rank.
            Zeros are never chosen.
        budget: the sum of all ranks.

    Returns:
        One rank per layer, in the order of `spectra`, possibly 0. The sum is the budget unless
        fewer scores are positive. Ties go to the earlier layer.
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
    """Choose ranks by score per cost, with a limit on the sum of costs.

    The algorithm is greedy: it takes the best ratio that still fits. The scores of a layer descend
    and its ranks have equal cost, so a layer always gets its first directions. The unused budget is
    less than the cost of one more rank in any layer that could still grow.

    Args:
        spectra: as in `redistribute`.
        costs: the cost of one rank of each layer, for example in parameters.
        budget: the maximum of the sum of costs.

    Returns:
        One rank per layer, in the order of `spectra`, possibly 0. Ties go to the earlier layer.
    """
    pool = [
        (score / costs[name], name)
        for name, scores in spectra.items()
        for score in scores.tolist()  # copies from the device once
        if score > 0
    ]
    pool.sort(key=lambda entry: entry[0], reverse=True)  # stable: ties stay in order
    ranks = dict.fromkeys(spectra, 0)
    for _, name in pool:
        if costs[name] <= budget:
            budget -= costs[name]
            ranks[name] += 1
    return ranks
