"""What the leading directions of white noise hold: LoftQ's gain on an error without structure."""

from __future__ import annotations

import numpy as np

POINTS = 20_000


def leading_share(rows: int, columns: int, rank: int) -> float:
    """The share of the nuclear norm that the top `rank` singular values of noise make up.

    The squared singular values of an m × n matrix (m >= n) of independent entries of variance 1/m
    follow Marchenko and Pastur's law with y = n / m. With the square written as
    l(θ) = 1 + y + 2 sqrt(y) cos θ, 0 <= θ <= π, the largest at θ = 0, its density is
    2 sin²θ / (π l(θ)) dθ: smooth, so that midpoints integrate it.

    Raises:
        ValueError: the rank is not within 1 … min(rows, columns).
    """
    small, large = sorted((rows, columns))
    if not 1 <= rank <= small:
        raise ValueError(f"rank={rank}; allowed are 1 … {small} for {rows} × {columns}")
    y = small / large
    angles = (np.arange(POINTS) + 0.5) * (np.pi / POINTS)
    squares = 1 + y + 2 * np.sqrt(y) * np.cos(angles)
    density = 2 * np.sin(angles) ** 2 / (np.pi * squares) * (np.pi / POINTS)
    counted = np.cumsum(density) / density.sum()
    held = np.cumsum(density * np.sqrt(squares))
    return float(np.interp(rank / small, counted, held) / held[-1])
