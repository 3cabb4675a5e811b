"""How far the factors of a fast decomposition are from those of the full one, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.papers.fast_svd.decomposing import Pair


@dataclass(frozen=True)
class Errors:
    """The four measures of the package's docstring."""

    difference: float
    excess: float
    entries: float
    overlap: float


@torch.no_grad()
def errors_of(found: Pair, exact: Pair, weight: Float[Tensor, "out in"]) -> Errors:
    """Of s = 1; `exact` has the same rank."""
    product, best = _product(found), _product(exact)
    optimum = float((weight.double() - best).norm())
    return Errors(
        difference=float((product - best).norm() / best.norm()),
        excess=float((weight.double() - product).norm()) / optimum - 1,
        entries=mean_entry_difference(found, exact),
        overlap=overlap(found.lora_B, exact.lora_B),
    )


def _product(pair: Pair) -> Float[Tensor, "out in"]:
    return pair.lora_B.double() @ pair.lora_A.double()


def mean_entry_difference(found: Pair, exact: Pair) -> float:
    """Of A and B together, each triplet in the sign that fits the exact one better."""
    both = [torch.cat([pair.lora_A.T, pair.lora_B]).double() for pair in (found, exact)]
    signs = torch.where((both[0] * both[1]).sum(0) < 0, -1.0, 1.0)
    return float((signs * both[0] - both[1]).abs().mean())


def overlap(found: Float[Tensor, "out rank"], exact: Float[Tensor, "out rank"]) -> float:
    """The mean squared cosine of the angles between two ranges, 1 where they are the same."""
    first, second = (torch.linalg.qr(basis.double())[0] for basis in (found, exact))
    return float((first.T @ second).square().sum() / exact.shape[1])
