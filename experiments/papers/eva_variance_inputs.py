"""The inputs of a model's layers: what their first directions explain, and how soon they are found.

With C the covariance of a layer's inputs (n × n) and Q (n × r) an orthonormal basis of the rows of
A, A's directions explain tr(Qᵀ C Q) / tr C of their variance. A random subspace explains r / n on
average. EVA's explains the most that is possible on the data it has seen.

Layers that read one tensor (query, key and value; gate and up) count once here, by the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import init_factors
from lora_init.calibration.collect import collect
from lora_init.calibration.memory import statistics_of
from lora_init.calibration.sums import Moments, joined
from lora_init.initializers.eva import EvaOptions
from lora_init.layer import LayerRequest, LayerStatistics
from lora_init.linalg.moments import InputStatistics
from lora_init.progress import tracked
from lora_init.registry import CalibrationRequest
from lora_init.weights.kinds import oriented_weight

from ..console import say
from .subject import Layer, Subject
from .tasks import Batches

RANDOM = ("kaiming", "gaussian")
THE_END, ANOTHER_ORDER, OTHER_DATA = "all batches", "another order", "all of other films"

INDEPENDENT = 1e-6
"""Rows of A with a smaller share of the largest singular value depend on the others."""

Inputs = dict[tuple[str, ...], InputStatistics]
"""The statistics of each distinct input, by the names of the layers that read it."""

Directions = dict[tuple[str, ...], torch.Tensor]
"""EVA's A for each distinct input."""


def prefixes(
    subject: Subject, names: Sequence[str], batches: Batches, counts: Sequence[int]
) -> Iterator[tuple[int, Inputs]]:
    """The moments of the first so many batches, for every count: one pass in all."""
    total: Inputs = {}
    before = 0
    for count in tracked(counts, f"inputs of {subject.name}"):
        layers = collect(subject.model, names, CalibrationRequest(), batches[before:count]).layers
        found = distinct(layers)
        total = {key: merged(total[key], new) if total else new for key, new in found.items()}
        before = count
        yield count, total


def distinct(layers: Mapping[str, LayerStatistics]) -> Inputs:
    readers: dict[int, list[str]] = {}
    for name, statistics in layers.items():
        readers.setdefault(id(statistics.inputs), []).append(name)
    return {tuple(names): layers[names[0]].inputs for names in readers.values()}


def measure_inputs(
    subject: Subject,
    chosen: Sequence[Layer],
    own: Batches,
    other: Batches,
    options: Any,
) -> tuple[list[dict], list[dict], list[dict], list[dict]]:
    """Rows of explained variance, of convergence, of components that turn, and of ranks.

    Args:
        chosen: the layers whose directions are looked at; ranks are chosen over all layers.
        own, other: batches of different films, equally many.
    """
    names = [layer.name for layer in chosen]
    counts = powers_of_two(len(own))
    say(
        f"  {subject.name}: inputs over {len(own)} batches, in {1 + options.orders} orders, and "
        "of other films"
    )
    everything = [layer.name for layer in subject.layers]
    found: dict[int, Directions] = {}
    for count, total in prefixes(subject, everything, own, followed(counts)):
        seen = {key: total[key] for key in total if key[0] in set(names)}
        found[count] = found_directions(seen, options.rank)
    ((_, fresh),) = prefixes(subject, names, other, [len(other)])
    best = found_directions(fresh, options.rank)
    converged = [
        row
        for count in counts
        for against, there in ((THE_END, found[counts[-1]]), (OTHER_DATA, best))
        for row in compared(found[count], there, best, fresh, count, against)
    ]
    for order in range(options.orders):
        generator = torch.Generator().manual_seed(options.seed + order)
        mixed = torch.randperm(len(own), generator=generator)
        # After all batches every order has seen the same; every second count says how it comes.
        some = counts[-2::-2][::-1]
        for count, again in prefixes(subject, names, [own[i] for i in mixed[: some[-1]]], some):
            shuffled = found_directions(again, options.rank)
            converged += compared(shuffled, found[count], best, fresh, count, ANOTHER_ORDER, order)
    explained = explained_variance(subject, seen, fresh, options)
    ranks = chosen_ranks(subject, total, options)
    return explained, converged, turning(found), ranks


def followed(counts: Sequence[int]) -> list[int]:
    """With each count also the next one, for what one more batch turns; the last is preceded."""
    last = counts[-1]
    return sorted({*counts, *(count + 1 for count in counts[:-1]), max(last - 1, 1)})


def found_directions(inputs: Inputs, rank: int) -> Directions:
    return {key: directions(statistics, rank) for key, statistics in inputs.items()}


def compared(
    own: Directions,
    there: Directions,
    best: Directions,
    fresh: Inputs,
    count: int,
    against: str,
    order: int = 0,
) -> list[dict]:
    """By input: the overlap of `own` with `there`, and its variance relative to that of `best`."""
    return [
        {
            "layer": key[0],
            "batches": count,
            "against": against,
            "order": order,
            "overlap": overlap(own[key], there[key]),
            "kept": explained_share(statistics.covariance, own[key])
            / explained_share(statistics.covariance, best[key]),
        }
        for key, statistics in fresh.items()
    ]


def turning(found: Mapping[int, Directions]) -> list[dict]:
    """By input and number of batches: how far the newest batch turned the components.

    EVA stops a layer once the cosine of each component with the one of a batch before is 0.99
    (`tau`) or more; the least of them decides.
    """
    return [
        {
            "layer": key[0],
            "batches": count,
            "cosine": least_cosine(found[count - 1][key], now),
        }
        for count in sorted(found)
        if count - 1 in found
        for key, now in found[count].items()
    ]


def explained_variance(subject: Subject, seen: Inputs, fresh: Inputs, options: Any) -> list[dict]:
    """By input, rank and method: the share on the data seen, and on other films."""
    kinds = {layer.name: layer.kind for layer in subject.layers}
    rows = []
    for key, statistics in seen.items():
        width = len(statistics.mean)
        ranks = [rank for rank in options.ranks if rank <= width]
        for rank in ranks:
            starts = {"eva": directions(statistics, rank)}
            for method in RANDOM:
                shape = torch.empty(width, width)
                starts[method] = init_factors(
                    shape, method, r=rank, seed=options.seed, name=key[0]
                ).lora_A
            for method, lora_A in starts.items():
                rows.append(
                    {
                        "layer": key[0],
                        "kind": ", ".join(shortened(kinds[name]) for name in key),
                        "rank": rank,
                        "method": method,
                        "seen": explained_share(statistics.covariance, lora_A),
                        "fresh": explained_share(fresh[key].covariance, lora_A),
                        "random": rank / width,
                    }
                )
    return rows


def chosen_ranks(subject: Subject, inputs: Inputs, options: Any) -> list[dict]:
    """EVA's ranks over all layers, from `rank` each."""
    found = {name: statistics for key, statistics in inputs.items() for name in key}
    requests = {
        layer.name: LayerRequest(
            options.rank,
            tuple(oriented_weight(subject.model.get_submodule(layer.name)).shape),
            LayerStatistics(inputs=found[layer.name]),
            partial(oriented_weight, subject.model.get_submodule(layer.name)),
        )
        for layer in subject.layers
    }
    ranks = EvaOptions(rho=options.rho).allocate(requests)
    return [
        {
            "layer": layer.name,
            "block": layer.block,
            "kind": shortened(layer.kind),
            "rank": ranks[layer.name],
            "parameters": ranks[layer.name] * sum(requests[layer.name].shape),
            "uniform": options.rank * sum(requests[layer.name].shape),
        }
        for layer in subject.layers
    ]


def shortened(kind: str) -> str:
    """What a layer does, in a word or two: "query", "attention output", "q"."""
    parts = kind.removesuffix(".dense").split(".")
    last = parts[-1].removesuffix("_proj")
    return "attention output" if parts == ["attention", "output"] else last


def directions(inputs: InputStatistics, rank: int, center: bool = True) -> Float[Tensor, "rank in"]:
    """EVA's A, by the library's own initializer."""
    width = len(inputs.mean)
    options = EvaOptions(rho=1.0, center=center)
    return init_factors(torch.empty(width, width), options, r=rank, inputs=inputs).lora_A


def row_space(lora_A: Float[Tensor, "rank in"]) -> Float[Tensor, "in dimensions"]:
    """An orthonormal basis of the rows, float64; rows that depend on others add nothing."""
    _, values, right = torch.linalg.svd(lora_A.double(), full_matrices=False)
    return right[values > INDEPENDENT * values[0]].T


def explained_share(covariance: Float[Tensor, "in in"], lora_A: Float[Tensor, "rank in"]) -> float:
    """tr(Qᵀ C Q) / tr C: how much of the variance lies in the row space of A."""
    covariance, basis = covariance.double(), row_space(lora_A)
    return float(((covariance @ basis) * basis).sum() / covariance.trace())


def overlap(first: Float[Tensor, "rank in"], second: Float[Tensor, "rank in"]) -> float:
    """‖A₁ A₂ᵀ‖² / r for orthonormal rows: the mean squared cosine of the subspaces' angles."""
    return float((first.double() @ second.double().T).square().sum() / len(first))


def least_cosine(first: Float[Tensor, "rank in"], second: Float[Tensor, "rank in"]) -> float:
    """min |a_i · b_i| over unit rows of the same number: 1 where no component has turned."""
    return float((first.double() * second.double()).sum(1).abs().min())


def merged(first: InputStatistics, second: InputStatistics) -> InputStatistics:
    """The moments of both groups of tokens together."""
    return statistics_of(joined([_moments(first), _moments(second)]))


def _moments(found: InputStatistics) -> Moments:
    variance = found.covariance.diagonal().double().sum()
    return Moments(found.tokens, found.mean, found.covariance, variance)


def powers_of_two(last: int) -> list[int]:
    """1, 2, 4, … and `last`."""
    counts = []
    count = 1
    while count < last:
        counts.append(count)
        count *= 2
    return [*counts, last]
