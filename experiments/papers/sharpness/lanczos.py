"""The extreme eigenvalues of a symmetric operator, by Lanczos with full reorthogonalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Extremes:
    """The ends of a spectrum.

    Attributes:
        largest, smallest: eigenvalues, with sign. The smallest is a bound from above; only the
            largest decides when to stop.
        error: a bound on the distance of `largest` from an eigenvalue: the residual's norm.
        products: how often the operator was applied.
        converged: the bound is within the tolerance.
    """

    largest: float
    smallest: float
    error: float
    products: int
    converged: bool


def extreme_eigenvalues(
    times: Callable[[Float[Tensor, " size"]], Float[Tensor, " size"]],
    start: Float[Tensor, " size"],
    *,
    tolerance: float,
    limit: int,
) -> Extremes:
    """Enlarge the Krylov space of `start` until the largest Ritz value is settled.

    A Ritz pair (θ, V s) of the basis V has the residual β |s_k|, with β the norm of what the next
    basis vector is made of and s_k the last entry of s: an eigenvalue lies within that distance of
    θ. The eigenvalue itself is usually nearer, by the square of it over the gap.

    Args:
        times: v -> H v, H symmetric.
        start: the first direction, drawn at random: one orthogonal to the eigenvector never finds
            it.
        tolerance: stop where the residual is below so many times the largest Ritz value's size.
        limit: at most so many products.

    Raises:
        ValueError: `start` is zero, or the operator returns what is not finite.
    """
    norm = start.norm()
    if not norm > 0:
        raise ValueError("start is zero; allowed is any other vector")
    basis = [start / norm]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        product = times(basis[-1])
        if not product.isfinite().all():
            raise ValueError("the operator's product is not finite")
        diagonal.append(float(product @ basis[-1]))
        space = torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors of the size that the second removes
            product = product - space.mT @ (space @ product)
        rest = float(product.norm())
        values, vectors = np.linalg.eigh(
            np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        )
        error = rest * abs(float(vectors[-1, -1]))
        largest = float(values[-1])
        # A Krylov space that is exhausted (rest = 0) has found what `start` can reach.
        converged = error <= tolerance * abs(largest)
        if converged or len(basis) >= min(limit, len(start)):
            return Extremes(largest, float(values[0]), error, len(diagonal), converged)
        basis.append(product / rest)
        beside.append(rest)
