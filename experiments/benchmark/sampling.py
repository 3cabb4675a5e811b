"""A dear reference on some layers of each shape: its time is scaled up, its results are kept.

Layers of one shape take torch.linalg equally long. Where all of them would take too long, those are
computed that quality is judged by (`references.spread`), and a shape's time is the mean of its
layers' times as many as there are. Where even those of one shape take too long, and what is
computed consists of equal rounds (LoftQ's alternations), one round is timed and counted as many
times as there are; it gives no result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.benchmark.contenders import Stopwatch
from experiments.benchmark.exact import COMPUTATIONS, Given, expected
from experiments.benchmark.rates import Rates
from experiments.benchmark.references import spread
from lora_init.plan.plan import Target

Shapes = list[tuple[int, int]]


@dataclass(frozen=True)
class Sample:
    """Which layers are computed, of how many, and what that will take.

    Attributes:
        names: by shape.
        counts: of all layers of the shape.
        needed: expected seconds, to within a factor of about two.
        once: shapes of which a single round is computed, of so many `rounds`.
    """

    names: Mapping[tuple[int, int], list[str]]
    counts: Mapping[tuple[int, int], int]
    needed: float
    once: frozenset[tuple[int, int]] = frozenset()
    rounds: int = 1

    @property
    def note(self) -> str:
        computed, whole = sum(map(len, self.names.values())), sum(self.counts.values())
        if computed == whole and not self.once:
            return ""
        told = f"torch.linalg: timed on {computed} of {whole} layers, and scaled by shape"
        if self.once:
            shapes = ", ".join(f"{rows}×{columns}" for rows, columns in sorted(self.once))
            told += f"; of {shapes} one round of {self.rounds}, counted {self.rounds} times"
        return told


@dataclass(frozen=True)
class Sampled:
    """What came out, and the seconds that all layers would take."""

    results: Mapping[str, Any]
    seconds: float


def choose(
    exact: str, targets: Sequence[Target], shapes: Shapes, rates: Rates, affordable: float
) -> Sample:
    """All layers, or if those take longer than is `affordable` the judged ones, and of the shapes
    that take longer than that by themselves a single round.

    Args:
        shapes: of what is decomposed: the layers' or, for EVA, the distinct inputs', which are
            always taken whole.
    """
    by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
    for target in targets:
        by_shape[target.shape].append(target.name)
    counts = {shape: len(names) for shape, names in by_shape.items()}
    needed = expected(exact, shapes, rates)
    if needed <= affordable or exact == "eigh":
        return Sample(by_shape, counts, needed)
    judged = set(spread(targets))
    chosen = {shape: [n for n in names if n in judged] for shape, names in by_shape.items()}
    rounds, once, needed = COMPUTATIONS[exact].rounds, set(), 0.0
    for shape, names in chosen.items():
        seconds = expected(exact, [shape] * len(names), rates)
        if rounds > 1 and seconds > affordable:
            once.add(shape)
            seconds /= rounds
        needed += seconds
    return Sample(chosen, counts, needed, frozenset(once), rounds)


def compute(exact: str, given: Given, sample: Sample, device: torch.device) -> Sampled:
    """The computation shape by shape, each with a watch of its own."""
    run: Callable[[Given], Mapping[str, Any]] = COMPUTATIONS[exact].run
    if not sample.note:  # all at once: distinct inputs may be shared between shapes
        watch = Stopwatch()
        results = watch(lambda: run(given), device)
        return Sampled(results, watch.seconds)
    results, seconds = {}, 0.0
    for shape, names in sample.names.items():
        part = replace(
            given,
            weights=restricted(given.weights, names),
            moments=restricted(given.moments, names),
            gradients=restricted(given.gradients, names),
        )
        once, watch = shape in sample.once, Stopwatch()
        if once:
            part = replace(part, alternations=1)
        found = watch(lambda part=part: run(part), device)
        results |= {} if once else found
        seconds += (
            watch.seconds * sample.counts[shape] / len(names) * (sample.rounds if once else 1)
        )
    return Sampled(results, seconds)


def restricted(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
