"""The error of a method's factors, computed independently of both libraries. 0 is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .contenders import LayerFactors
from .reference import Given, Truth
from .strategies import STRATEGIES

EXCESS = "excess"
SUBSPACE = "subspace"
DIFFERENCE = "difference"
OBJECTIVE = "objective"
MEANINGS = {
    EXCESS: "how much larger the remaining norm is than with the best factors of that rank",
    SUBSPACE: "the mean squared sine of the angles to the exact subspace",
    DIFFERENCE: "the relative distance to the exact factors",
    OBJECTIVE: "how much larger ‖W − Q − B A‖ is than with exact decompositions; "
    "below 0 it is smaller",
}


@dataclass(frozen=True)
class Judge:
    """A method's error: its kind, and a function of (layer, factors, given, truth)."""

    kind: str
    measure: Callable[[str, LayerFactors, Given, Truth], float | None]


def worst_error(
    method: str, made: Mapping[str, LayerFactors], given: Mapping[str, Given], truth: Truth
) -> float | None:
    """Return the largest error over the layers of `given`; None without a reference."""
    if method not in JUDGES:
        return None
    measure = JUDGES[method].measure
    found = [measure(name, made[name], layer, truth) for name, layer in given.items()]
    return max((error for error in found if error is not None), default=None)


def product(layer: LayerFactors) -> Float[Tensor, "out in"]:
    """Return s B A in float64."""
    return layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())


def excess(
    matrix: Float[Tensor, "m n"],
    approximation: Float[Tensor, "m n"],
    left: Float[Tensor, "m r"],
) -> float:
    """‖M - approximation‖ / ‖M - U_r U_rᵀ M‖ - 1, U_r the first left singular vectors.

    A subspace that is off by ε changes it by ε² only.
    """
    optimum = (matrix - left @ (left.T @ matrix)).norm()
    return float((matrix - approximation).norm() / optimum) - 1


def subspace_error(found: Float[Tensor, "n k"], exact: Float[Tensor, "n r"]) -> float:
    """The mean squared sine of the angles between two subspaces."""
    first, second = (torch.linalg.qr(basis.double())[0] for basis in (found, exact))
    # The part of `first` outside of `second`; 1 - cos² would lose all digits near 0.
    outside = first - second @ (second.T @ first)
    return float(outside.square().sum() / first.shape[1])


@torch.no_grad()
def pissa(name: str, layer: LayerFactors, given: Given, truth: Truth) -> float | None:
    """Of ‖W - s B A‖."""
    left = truth.first(name, "svd of W", given, len(layer.lora_A))
    return None if left is None else excess(given.weight.double(), product(layer), left)


@torch.no_grad()
def corda_ipm(name: str, layer: LayerFactors, given: Given, truth: Truth) -> float | None:
    """Of ‖W R - P W R‖, P the projection on the columns of B."""
    left = truth.first(name, "svd of W R", given, len(layer.lora_A))
    if left is None:
        return None
    target = given.weight.double() @ given.moment.double()
    basis = torch.linalg.qr(layer.lora_B.double())[0]
    return excess(target, basis @ (basis.T @ target), left)


@torch.no_grad()
def smallest(
    name: str, layer: LayerFactors, given: Given, truth: Truth, formula: str
) -> float | None:
    """Of the columns of B, compared with the last left singular vectors."""
    last = truth.last(name, formula, given, len(layer.lora_A))
    return None if last is None else subspace_error(layer.lora_B, last)


@torch.no_grad()
def olora(name: str, layer: LayerFactors, given: Given, truth: Truth) -> float:
    """Of both factors, compared with a float64 QR of the first columns of W."""
    weight = given.weight.double()
    basis = torch.linalg.qr(weight[:, : len(layer.lora_A)])[0]
    pairs = ((layer.lora_B.double(), basis), (layer.lora_A.double(), basis.T @ weight))
    return max(float((found - exact).norm() / exact.norm()) for found, exact in pairs)


@torch.no_grad()
def loftq(name: str, layer: LayerFactors, given: Given, truth: Truth) -> float | None:
    """Of the objective after the last alternation."""
    best = truth.of(name, "alternation", given)
    if best is None:
        return None
    left = given.weight.double() - layer.base.double() - product(layer)
    return float(left.norm() / best) - 1


@torch.no_grad()
def eva(name: str, layer: LayerFactors, given: Given, truth: Truth) -> float | None:
    """Of the rows of A, compared with the first principal directions of the inputs."""
    exact = truth.first(name, "eigh", given, len(layer.lora_A))
    return None if exact is None else subspace_error(layer.lora_A.T, exact)


@torch.no_grad()
def lora_ga(name: str, layer: LayerFactors, given: Given, truth: Truth) -> float | None:
    """Of the columns of B, compared with the gradient's left vectors r to 2r."""
    rank = len(layer.lora_A)
    exact = truth.first(name, "svd of G", given, 2 * rank)
    return None if exact is None else subspace_error(layer.lora_B, exact[:, rank:])


JUDGES: dict[str, Judge] = {
    **{name: Judge(EXCESS, pissa) for name in STRATEGIES if name.startswith("pissa")},
    "olora": Judge(DIFFERENCE, olora),
    "corda_ipm": Judge(EXCESS, corda_ipm),
    "corda_kpm": Judge(SUBSPACE, lambda *given: smallest(*given, "svd of W R lifted")),
    "bottom": Judge(SUBSPACE, lambda *given: smallest(*given, "svd of W")),
    "loftq": Judge(OBJECTIVE, loftq),
    "eva": Judge(SUBSPACE, eva),
    "lora_ga": Judge(SUBSPACE, lora_ga),
}
