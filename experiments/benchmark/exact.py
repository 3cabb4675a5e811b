"""The straightforward computation of each strategy: torch.linalg on one whole matrix after another.

What a reader of the papers would write, in float32 as PEFT does, and the peer where PEFT gives no
figure. Every function returns each layer's result, from which quality is judged where it is the
reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.benchmark.rates import Rates
from experiments.benchmark.strategies import LOFTQ_ITERATIONS
from lora_init.quantization import Quantizer


@dataclass(frozen=True)
class Given:
    """What the computations start from, by layer.

    Attributes:
        weights: (out, in).
        moments: second moments (in, in) of the layers' inputs, the same object where they share
            one; a method that is given none asks for none.
        gradients: of the loss with respect to the weights.
        alternations: LoftQ's T; each of them costs the same.
    """

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    rank: int
    alternations: int = LOFTQ_ITERATIONS


def orthogonalized(given: Given) -> dict[str, tuple[Tensor, Tensor]]:
    """OLoRA by the QR decomposition of the whole weight."""
    made = {}
    for name, weight in given.weights.items():
        basis, triangle = torch.linalg.qr(weight.float())
        made[name] = basis[:, : given.rank].clone(), triangle[: given.rank].clone()
    return made


def decomposed(given: Given) -> dict[str, tuple[Tensor, Tensor]]:
    """The first and last r left singular vectors of the weight."""
    return {
        name: ends(torch.linalg.svd(weight.float(), full_matrices=False)[0], given.rank)
        for name, weight in given.weights.items()
    }


def decomposed_products(given: Given) -> dict[str, tuple[Tensor, Tensor]]:
    """CorDA's: those of W R."""
    made = {}
    for name, weight in given.weights.items():
        product = weight.float() @ given.moments[name].float()
        made[name] = ends(torch.linalg.svd(product, full_matrices=False)[0], given.rank)
    return made


def decomposed_gradients(given: Given) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA-GA's: those of the gradient, twice as many."""
    return {
        name: ends(torch.linalg.svd(gradient, full_matrices=False)[0], 2 * given.rank)
        for name, gradient in given.gradients.items()
    }


def alternated(given: Given) -> dict[str, float]:
    """LoftQ's T alternations; returns each layer's objective ‖W - Q - s B A‖ after the last."""
    quantizer = Quantizer()
    objectives = {}
    for name, weight in given.weights.items():
        weight = weight.float()
        product = torch.zeros_like(weight)
        for _ in range(given.alternations):
            residual = weight - quantizer.roundtrip(weight - product)
            left, values, right = torch.linalg.svd(residual, full_matrices=False)
            kept = slice(given.rank)
            product = (left[:, kept] * values[kept]) @ right[kept]
        objectives[name] = float(torch.linalg.matrix_norm(residual - product))
    return objectives


def principal(given: Given) -> dict[str, Tensor]:
    """EVA's directions: an eigendecomposition for each distinct input."""
    made: dict[int, Tensor] = {}
    for moment in distinct(given.moments):
        made[id(moment)] = torch.linalg.eigh(moment.float())[1][:, -2 * given.rank :].clone()
    return {name: made[id(moment)] for name, moment in given.moments.items()}


def distinct(moments: Mapping[str, Tensor]) -> Iterator[Tensor]:
    return iter({id(moment): moment for moment in moments.values()}.values())


def ends(vectors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return vectors[:, :rank].clone(), vectors[:, -rank:].clone()


@dataclass(frozen=True)
class Computation:
    """A straightforward computation.

    Attributes:
        run: what is timed.
        by_rank: whether its cost depends on the rank.
        decompositions: full SVDs (or what costs as much) of each weight, for `expected`.
        rounds: equal ones that it consists of: one may be timed in place of all.
    """

    run: Callable[[Given], Mapping]
    by_rank: bool = False
    decompositions: float = 1.0
    rounds: int = 1


COMPUTATIONS: dict[str, Computation] = {
    "qr": Computation(orthogonalized, decompositions=0.2),
    "svd": Computation(decomposed),
    "svd of W R": Computation(decomposed_products, decompositions=1.1),
    "svd of G": Computation(decomposed_gradients),
    "alternation": Computation(
        alternated, by_rank=True, decompositions=LOFTQ_ITERATIONS, rounds=LOFTQ_ITERATIONS
    ),
    "eigh": Computation(principal, decompositions=0.8),
}


def expected(exact: str, shapes: list[tuple[int, int]], rates: Rates) -> float:
    """Seconds that full decompositions of `shapes` will take, to within a factor of about two."""
    cubic = sum(m * n * min(m, n) for m, n in shapes)
    return COMPUTATIONS[exact].decompositions * cubic / rates.svd
