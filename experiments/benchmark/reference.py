"""The textbook computation of each method with `torch.linalg`, one whole matrix after another.

In float32 it is a contender. In float64 it is the truth that errors are measured against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.quantization import Quantizer

from .powerlaw import PowerLaw
from .strategies import LOFTQ_ITERATIONS

# CorDA adds this share of the mean diagonal to R. It makes the last triplets of W R unique where
# R is singular in float32 (`lora_init.initializers.corda`).
CORDA_LIFT = 1e-6
# No float64 decomposition of m n min(m, n) operations or more: it would take minutes.
LARGEST = {"cpu": 2**34, "cuda": 2**37}


@dataclass(frozen=True)
class Given:
    """What the formulas read for one layer: its weight (out, in) and statistics of the data.

    Attributes:
        moment, covariance: of the layer's inputs, (in, in).
        gradient: of the loss with respect to the weight.
    """

    weight: Float[Tensor, "m n"]
    rank: int
    moment: Float[Tensor, "n n"] | None = None
    covariance: Float[Tensor, "n n"] | None = None
    gradient: Float[Tensor, "m n"] | None = None

    def to(self, dtype: torch.dtype) -> Given:
        names = ("weight", "moment", "covariance", "gradient")
        parts = {name: getattr(self, name) for name in names}
        return replace(
            self, **{name: part.to(dtype) for name, part in parts.items() if part is not None}
        )


def left_vectors(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m k"]:
    return torch.linalg.svd(matrix, full_matrices=False)[0]


def lifted_product(given: Given) -> Float[Tensor, "m n"]:
    lift = CORDA_LIFT * given.moment.diagonal().mean()
    return given.weight @ given.moment + lift * given.weight


def alternation(given: Given) -> Float[Tensor, ""]:
    """LoftQ's alternations; return the objective ‖W - Q - B A‖ after the last one."""
    quantizer, product = Quantizer(), torch.zeros_like(given.weight)
    for _ in range(LOFTQ_ITERATIONS):
        quantized = quantizer.roundtrip((given.weight - product).float()).to(given.weight.dtype)
        residual = given.weight - quantized
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        product = (left[:, : given.rank] * values[: given.rank]) @ right[: given.rank]
    return torch.linalg.matrix_norm(residual - product)


FORMULAS: dict[str, Callable[[Given], Tensor]] = {
    "qr": lambda given: torch.linalg.qr(given.weight)[0],
    "svd of W": lambda given: left_vectors(given.weight),
    "svd of W R": lambda given: left_vectors(given.weight @ given.moment),
    "svd of W R lifted": lambda given: left_vectors(lifted_product(given)),
    "svd of G": lambda given: left_vectors(given.gradient),
    "alternation": alternation,
    "eigh": lambda given: torch.linalg.eigh(given.covariance)[1].flip(1),
}
"""By name: the vectors in descending order of their values, or LoftQ's objective."""


class Truth:
    """The float64 results for the layers of one model, each computed once.

    Args:
        known: synthetic weights whose singular vectors are known without a decomposition.
    """

    def __init__(self, known: dict[str, PowerLaw]) -> None:
        self.known = known
        self._found: dict[tuple[str, str, int], Tensor] = {}

    def of(self, name: str, formula: str, given: Given) -> Tensor | None:
        """Return the result of a formula for the layer `name`, or None where it is too large."""
        key = (name, formula, given.rank if formula == "alternation" else 0)
        if key not in self._found:
            m, n = given.weight.shape
            if m * n * min(m, n) >= LARGEST[given.weight.device.type]:
                return None
            self._found[key] = FORMULAS[formula](given.to(torch.float64))
        return self._found[key]

    def first(self, name: str, formula: str, given: Given, rank: int) -> Tensor | None:
        """Return the first `rank` vectors."""
        if formula == "svd of W" and name in self.known:
            return self.known[name].left(0, rank, given.weight.device).double()
        vectors = self.of(name, formula, given)
        return None if vectors is None else vectors[:, :rank]

    def last(self, name: str, formula: str, given: Given, rank: int) -> Tensor | None:
        """Return the last `rank` vectors."""
        vectors = self.of(name, formula, given)
        return None if vectors is None else vectors[:, -rank:]
