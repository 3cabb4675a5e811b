"""Dense eigensolvers and singular value decompositions, and the sizes up to which they are used.

An accelerator solves a stack of small dense problems one after another, each slower than one core
of the host. Small matrices are therefore copied to the host, where all cores share them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from jaxtyping import Float
from threadpoolctl import ThreadpoolController
from torch import Tensor

from lora_init.linalg.operators import Operator

LAPACK_DEVICES = ("cpu",)
"""Devices that call LAPACK; on others, stacks are decomposed by products where possible."""
HOST_DIMENSION = 640
"""The host solves the problems of an accelerator up to this size."""
DENSE_DIMENSION = 256
DENSE_SHARE = 0.1
"""A dense solver takes the Gram matrix up to this size, or above this share of it."""
GRAM_DIMENSION = 1024
"""A Krylov space of the first triplets uses the Gram matrix up to this smaller side; above, W."""
TRIPLET_DIMENSION = 160
"""For the first triplets of a matrix, a dense solver is used only up to this size."""
PARTIAL_DIMENSION = 384
"""LAPACK's partial eigensolver beats torch's full one from this size."""

_scipy_lock = threading.Lock()


def eigh(
    matrix: Float[Tensor, "*stack n n"],
) -> tuple[Float[Tensor, "*stack n"], Float[Tensor, "*stack n n"]]:
    """Return all eigenvalues, ascending, and eigenvectors of a symmetric matrix.

    Only the lower triangle is read.
    """
    if _stays(matrix):
        return torch.linalg.eigh(matrix)
    return _on_host(torch.linalg.eigh, matrix)


def svd(
    matrix: Float[Tensor, "*stack m n"],
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack k"], Float[Tensor, "*stack k n"]]:
    """Return the thin singular value decomposition. All its vectors are orthonormal."""
    if not _stays(matrix):
        return _on_host(lambda one: torch.linalg.svd(one, full_matrices=False), matrix)
    # CUDA's default, Jacobi's method, does not promise orthonormal vectors for singular matrices.
    jacobi = matrix.device.type == "cuda" and "cuda" not in LAPACK_DEVICES
    return torch.linalg.svd(matrix, full_matrices=False, driver="gesvd" if jacobi else None)


def has_partial_solver(matrix: Tensor | Operator) -> bool:
    """Return whether a few eigenpairs of its smaller side cost less than all of them."""
    alone = len(matrix.shape) == 2 and matrix.device.type == "cpu"
    return alone and min(matrix.shape) >= PARTIAL_DIMENSION


def eigenpairs(
    matrix: Float[Tensor, "*stack n n"], first: int, last: int
) -> tuple[Float[Tensor, "*stack k"], Float[Tensor, "*stack n k"]]:
    """Return eigenpairs first to last-1 of a symmetric matrix, eigenvalues ascending."""
    if not has_partial_solver(matrix) or 4 * (last - first) > matrix.shape[-1]:
        values, vectors = eigh(matrix)
        return values[..., first:last], vectors[..., first:last]
    # torch has no partial solver. scipy's own threads and torch's wait for work by spinning on the
    # same cores, so scipy gets one thread. This limit holds for the process, hence the lock.
    import scipy.linalg  # here: it takes longer to import than the rest of the package

    with _scipy_lock, _openblas().limit(limits=1):
        values, vectors = scipy.linalg.eigh(
            matrix.detach().numpy(), subset_by_index=[first, last - 1]
        )
    return torch.from_numpy(values), torch.from_numpy(vectors)


@cache
def _openblas() -> ThreadpoolController:
    """scipy's own thread pool."""
    return ThreadpoolController().select(internal_api="openblas")


def _stays(matrix: Tensor) -> bool:
    large = max(matrix.shape[-2:]) > HOST_DIMENSION
    return large or matrix.device.type in LAPACK_DEVICES


def _on_host(function: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor) -> tuple:
    """Apply `function` to every matrix of the stack, with one thread each."""
    stack = matrix.shape[:-2]
    members = matrix.to("cpu").reshape(-1, *matrix.shape[-2:])
    before = torch.get_num_threads()
    threads = min(len(members), before)
    if threads <= 1:
        results = [function(member) for member in members]
    else:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results = list(pool.map(function, members))
        torch.set_num_threads(before)  # new threads inherit the number that any thread set last
    parts = (torch.stack(part) for part in zip(*results, strict=True))
    return tuple(part.reshape(*stack, *part.shape[1:]).to(matrix.device) for part in parts)
