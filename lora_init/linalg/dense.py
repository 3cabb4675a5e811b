"""Gram matrices, and dense eigensolvers for them."""

from __future__ import annotations

import threading
from functools import cache

import scipy.linalg
import torch
from jaxtyping import Float
from threadpoolctl import ThreadpoolController
from torch import Tensor

from lora_init.linalg import choice, small
from lora_init.linalg.gram import accumulate_gram, mirror
from lora_init.linalg.operators import Operator

_scipy_turn = threading.Lock()


def smaller_side(matrix: Float[Tensor, "*stack m n"]) -> Float[Tensor, "*stack tall wide"]:
    """The matrix, or its transpose, with no more columns than rows."""
    return matrix.mT if matrix.shape[-2] < matrix.shape[-1] else matrix


def gram(tall: Float[Tensor, "*stack m n"], dtype: torch.dtype) -> Float[Tensor, "*stack n n"]:
    """``W^T W`` accumulated in `dtype`, without a copy of all of W in it."""
    n = tall.shape[-1]
    result = tall.new_zeros(*tall.shape[:-2], n, n, dtype=dtype)
    for rows in tall.split(choice.GRAM_ROWS, dim=-2):
        rows = rows.to(dtype)
        if rows.ndim == 2:
            accumulate_gram(result, rows)
        else:
            result += rows.mT @ rows
    if tall.ndim == 2:
        mirror(result)
    return result


def has_partial_solver(matrix: Tensor | Operator) -> bool:
    """Whether few eigenpairs of its smaller side take less time than all of them."""
    alone = len(matrix.shape) == 2 and matrix.device.type == "cpu"
    return alone and min(matrix.shape) >= choice.PARTIAL_DIMENSION


def eigenpairs(
    matrix: Float[Tensor, "*stack n n"], first: int, last: int
) -> tuple[Float[Tensor, "*stack k"], Float[Tensor, "*stack n k"]]:
    """Eigenpairs first … last-1 of a symmetric matrix, ascending."""
    n = matrix.shape[-1]
    if not has_partial_solver(matrix) or 4 * (last - first) > n:
        values, vectors = small.eigh(matrix)
        return values[..., first:last], vectors[..., first:last]
    # torch has no partial solver; LAPACK's computes r vectors in a quarter of the time of all.
    with _scipy_turn, _openblas().limit(limits=1):
        values, vectors = scipy.linalg.eigh(
            matrix.detach().numpy(), subset_by_index=[first, last - 1]
        )
    return torch.from_numpy(values), torch.from_numpy(vectors)


@cache
def _openblas() -> ThreadpoolController:
    """scipy's own thread pool. Its threads and torch's wait for work by spinning, on the same
    cores: two threads here make an eigendecomposition between torch's products 1.6 to 2.3 times
    slower than one (2 cores, n = 384 to 2048). The limit is the whole process's, hence the lock.
    """
    return ThreadpoolController().select(internal_api="openblas")
