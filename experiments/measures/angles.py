"""Principal angles between subspaces: how far training rotated a factor's span.

Cosines of the angles are the singular values of Qᵀ P, sines those of (I - Q Qᵀ) P, for orthonormal
bases Q and P. An arc cosine near 1 loses half of the digits, so angles below 45 degrees are
computed from the sine.

Source: Björck & Golub, "Numerical Methods for Computing Angles Between Linear Subspaces",
Mathematics of Computation, 1973.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

VANISHING = 1e-7  # of the largest singular value: below it, float32 factors hold only rounding


def span(columns: Float[Tensor, "size count"]) -> Float[Tensor, "size dimension"]:
    """An orthonormal basis of the columns' span, float64; no column for zero columns."""
    left, values, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    return left[:, values > VANISHING * values[0]]


@torch.no_grad()
def principal_angles(
    first: Float[Tensor, "size m"], second: Float[Tensor, "size n"]
) -> Float[Tensor, " angles"]:
    """Angles in degrees, ascending, between the spans of two sets of columns.

    There are as many as the smaller span has dimensions. All are 0 if it lies in the other.
    """
    larger, smaller = span(first), span(second)
    if larger.shape[1] < smaller.shape[1]:
        larger, smaller = smaller, larger
    overlap = larger.T @ smaller
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    sines = torch.linalg.svdvals(smaller - larger @ overlap).flip(0).clamp(max=1)
    return torch.rad2deg(torch.where(sines < cosines, sines.asin(), cosines.acos()))


def mean_angle(initial: Float[Tensor, "size m"], final: Float[Tensor, "size n"]) -> float | None:
    """The mean principal angle in degrees; None if either is zero."""
    angles = principal_angles(initial, final) if initial.any() and final.any() else None
    return None if angles is None else float(angles.mean())
