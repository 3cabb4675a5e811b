"""The inputs of a model's layers: what their first directions explain, how soon these are found,
and which ranks follow.

Layers that read one tensor (query, key and value; gate and up) count once here, by the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from lora_init import init_factors
from lora_init.calibration.collect import collect
from lora_init.initializers.eva import EvaOptions
from lora_init.layer import LayerRequest, LayerStatistics
from lora_init.linalg.moments import InputStatistics
from lora_init.progress import tracked
from lora_init.registry import CalibrationRequest
from lora_init.weights.kinds import oriented_weight

from ...console import say
from ..subject import Layer, Subject
from ..tasks import Batches
from .options import EvaVarianceOptions
from .variance import (
    directions,
    explained_share,
    least_cosine,
    merged,
    overlap,
    powers_of_two,
)

RANDOM = ("kaiming", "gaussian")
THE_END, ANOTHER_ORDER, OTHER_DATA = "all batches", "another order", "all of other films"

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
    options: EvaVarianceOptions,
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
    converged = convergence({count: found[count] for count in counts}, best, fresh)
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


def convergence(found: Mapping[int, Directions], best: Directions, fresh: Inputs) -> list[dict]:
    """By input and number of batches: overlaps with all of them and with other films' subspace.

    Args:
        found: EVA's A by the number of batches.
        best: that of `fresh`, the inputs of other films.
    """
    last = max(found)
    return [
        row
        for count, own in found.items()
        for against, there in ((THE_END, found[last]), (OTHER_DATA, best))
        for row in compared(own, there, best, fresh, count, against)
    ]


def compared(
    own: Directions,
    there: Directions,
    best: Directions,
    fresh: Inputs,
    count: int,
    against: str,
    order: int = 0,
) -> list[dict]:
    """By input: the overlap of `own` with `there`, and the share of the variance that `best`
    explains of other films' inputs that `own` explains of them."""
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


def explained_variance(
    subject: Subject, seen: Inputs, fresh: Inputs, options: EvaVarianceOptions
) -> list[dict]:
    """By input, rank and method: the share on the data seen, and on other films."""
    kinds = {layer.name: layer.kind for layer in subject.layers}
    rows = []
    for key, statistics in seen.items():
        width = len(statistics.mean)
        ranks = [rank for rank in options.ranks if rank <= width]
        for rank in ranks:
            starts = {"eva": directions(statistics, rank)}
            for method in RANDOM:
                starts[method] = random_start(method, key[0], width, rank, options.seed)
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


def random_start(method: str, name: str, width: int, rank: int, seed: int) -> torch.Tensor:
    """A of a method that reads nothing but the layer's shape, by the library's function."""
    return init_factors(torch.empty(width, width), method, r=rank, seed=seed, name=name).lora_A


def chosen_ranks(subject: Subject, inputs: Inputs, options: EvaVarianceOptions) -> list[dict]:
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
