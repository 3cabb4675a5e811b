"""Shares of variance, angles of subspaces, energies of gradients. Pure maths.

With C the covariance of a layer's inputs (n × n) and Q (n × r) an orthonormal basis of the rows of
A, A's directions explain tr(Qᵀ C Q) / tr C of their variance: for a random subspace r / n on
average, for EVA's the most that is possible on the data it has seen. For a zero B the gradient of
B is s G Aᵀ, so that ‖∇B‖² = s² tr(A GᵀG Aᵀ): with GᵀG in the place of C, the same question.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import init_factors
from lora_init.calibration.memory import statistics_of
from lora_init.calibration.sums import Moments, joined
from lora_init.initializers.eva import EvaOptions
from lora_init.linalg.moments import InputStatistics

INDEPENDENT = 1e-6


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
    """‖A₁ A₂ᵀ‖² / r for orthonormal rows: the mean squared cosine of the subspaces' angles, 1 for
    the same subspace and r / n for random ones."""
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
