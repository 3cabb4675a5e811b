"""The first gradient of B: by how much a start's A lets B move.

∂L/∂B = s G A0ᵀ for whatever B0 is, G the gradient of the whole weight. Its expected square over
batches is measured in two ways, at s = 1 for all methods:

- as it comes, E‖G A0ᵀ‖², which grows with ‖A0‖²: kaiming's A has ‖A‖² = r / 3, EVA's r, gaussian's
  n / r;
- with orthonormal rows, which the theorem is about: E‖G Q‖² / E‖G‖², Q an orthonormal basis of
  A0's rows: the share of the gradient's energy that the row space holds. No A of rank r holds more
  than the first r eigenvectors of E GᵀG, and a random one holds r / n on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.calibration.gradients import collect_gradients
from lora_init.progress import tracked
from lora_init.registry import resolve

from ..console import say
from .eva_variance_inputs import row_space
from .starts import (
    Gradients,
    calibration_for,
    moves_function,
    setting,
    startable,
    started,
)
from .subject import Layer, Subject
from .tasks import Batches


@dataclass
class FirstGradient:
    """Sums over batches for one method and layer.

    Attributes:
        square: of ‖G Aᵀ‖².
        inside: of ‖G Q‖².
        energy: of ‖G‖².
    """

    lora_A: Float[Tensor, "rank in"]
    basis: Float[Tensor, "in dimensions"] = field(init=False)
    square: float = 0.0
    inside: float = 0.0
    energy: float = 0.0
    batches: int = 0

    def __post_init__(self) -> None:
        self.basis = row_space(self.lora_A).to(self.lora_A.dtype)

    def add(self, gradient: Float[Tensor, "out in"]) -> None:
        self.square += square_norm(gradient @ self.lora_A.T)
        self.inside += square_norm(gradient @ self.basis)
        self.energy += square_norm(gradient)
        self.batches += 1

    def row(self) -> dict[str, float]:
        return {"raw": self.square / self.batches, "span": self.inside / self.energy}


class Ceiling:
    """The most that any orthonormal A of a rank can have: the first eigenvectors of E GᵀG."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None

    def add(self, gradient: Float[Tensor, "out in"]) -> None:
        product = gradient.T @ gradient
        self.gram = product if self.gram is None else self.gram.add_(product)

    def share(self, rank: int) -> float:
        values, _ = linalg.top_eigen(self.gram, rank)
        return float(values.double().sum() / self.gram.diagonal().double().sum())


def square_norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def first_gradient_methods(options: Any, with_moved: bool) -> list[str]:
    """Those asked for that train B."""
    methods = options.methods or startable()
    specs = {name: resolve(setting(name, options.rank))[0] for name in methods}
    return [
        name
        for name in methods
        if "lora_B" not in specs[name].frozen and (with_moved or not moves_function(specs[name]))
    ]


def measure_gradients(
    subject: Subject,
    layers: Sequence[Layer],
    own: Batches,
    fresh: Batches,
    options: Any,
    with_moved: bool,
) -> list[dict]:
    """One row a layer and method.

    Args:
        own: what data-driven methods are calibrated on.
        fresh: what the gradients are taken from, a batch at a time.
    """
    methods = first_gradient_methods(options, with_moved)
    names = [layer.name for layer in layers]
    say(f"  {subject.name}: first gradients of {len(methods)} methods on {len(layers)} layers")
    calibration = calibration_for(subject, methods, names, options.rank, own)
    waiting: dict[str, Mapping[str, FirstGradient]] = {}
    done: dict[str, Mapping[str, FirstGradient]] = {}
    for method in tracked(methods, "starting"):
        with started(subject, method, names, options.rank, calibration, seed=options.seed) as start:
            sums = {name: FirstGradient(lora_A) for name, lora_A in start.lora_A.items()}
            if moves_function(start.initializer):
                for batch in fresh:
                    add(sums, start.gradients([batch]))
                done[method] = sums
            else:
                waiting[method] = sums
    ceilings = {name: Ceiling() for name in names}
    for batch in tracked(fresh, "gradients"):
        gradients = collect_gradients(subject.model, names, [batch])
        for sums in [*waiting.values(), ceilings]:
            add(sums, gradients)
    best = {name: ceiling.share(options.rank) for name, ceiling in ceilings.items()}
    return [
        {
            "layer": layer.name,
            "block": layer.block,
            "kind": layer.kind,
            "method": method,
            "moved": method in done,
            **(waiting | done)[method][layer.name].row(),
            "ceiling": best[layer.name],
        }
        for method in methods
        for layer in layers
    ]


def add(sums: Mapping[str, FirstGradient | Ceiling], gradients: Gradients) -> None:
    for name, total in sums.items():
        total.add(gradients[name])
