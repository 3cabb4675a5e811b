"""The first singular triplets alone, in float64: as exact as a full decomposition, and cheaper.

A small matrix is squared and given to LAPACK's partial eigensolver: the largest values bear to be
squared. A large one is only multiplied with, by ARPACK's restarted Lanczos iteration until its
residuals are of float64's precision, since LAPACK reduces the whole square to tridiagonal form
first, memory's work: 2 s in place of 16 s for 16 triplets of 5632 × 2048. Either is independent of
what the library computes its own factors by.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

SMALL = 1024  # sides up to which LAPACK is no slower
SHARE = 8  # of a side: more triplets than that are LAPACK's as well


def leading(
    matrix: Float[Tensor, "n n"], count: int, tolerance: float = 0.0
) -> tuple[Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """Eigenvalues, descending, and eigenvectors of a symmetric positive semidefinite matrix.

    Args:
        tolerance: of an eigenvalue, relative; 0 is float64's precision.
    """
    return _found(len(matrix), count, matrix.device, lambda: matrix, matrix.matmul, tolerance)


def leading_left(
    matrix: Float[Tensor, "m n"], count: int, tolerance: float = 0.0
) -> Float[Tensor, "m k"]:
    """The first left singular vectors, in descending order."""
    if matrix.shape[0] > matrix.shape[1]:
        right = leading_left(matrix.T, count, tolerance)
        return torch.linalg.qr(matrix @ right)[0]
    return _found(
        len(matrix), count, matrix.device, lambda: matrix @ matrix.T,
        lambda vector: matrix @ (matrix.T @ vector), tolerance,
    )[1]  # fmt: skip


def _found(
    size: int,
    count: int,
    device: torch.device,
    square: Callable[[], Tensor],
    multiply: Callable[[Tensor], Tensor],
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Of the square of a side, which is made only where it is needed whole."""
    count = min(count, size)
    if device.type != "cpu":
        values, vectors = torch.linalg.eigh(square())
        return values[-count:].flip(0), vectors[:, -count:].flip(1)
    if size <= SMALL or count * SHARE > size:
        values, vectors = scipy.linalg.eigh(
            square().numpy(), subset_by_index=[size - count, size - 1]
        )
    else:
        operator = LinearOperator(
            (size, size), dtype=np.float64,
            matvec=lambda x: multiply(torch.from_numpy(np.ascontiguousarray(x))).numpy(),
        )  # fmt: skip
        # A start that is the same for everybody; ARPACK's own is drawn from a global generator.
        start = np.random.default_rng(0).standard_normal(size)
        values, vectors = eigsh(operator, k=count, which="LA", tol=tolerance, v0=start)
    order = np.argsort(values)[::-1]
    return torch.from_numpy(values[order].copy()), torch.from_numpy(vectors[:, order].copy())
