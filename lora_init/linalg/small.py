"""Eigenpairs and singular triplets of small matrices, computed on the host.

An accelerator solves a stack of small dense problems one after another, each slower than a core of
the host does. So small matrices are copied to the host, where every core takes some of them. What
is too large for that stays on its device.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import choice


def eigh(
    matrix: Float[Tensor, "*stack n n"], UPLO: str = "L"
) -> tuple[Float[Tensor, "*stack n"], Float[Tensor, "*stack n n"]]:
    """All eigenvalues, ascending, and eigenvectors of a symmetric matrix.

    Args:
        UPLO: the triangle that is read, "L" or "U".
    """
    if _stays(matrix):
        return torch.linalg.eigh(matrix, UPLO=UPLO)
    return _on_host(lambda one: torch.linalg.eigh(one, UPLO=UPLO), matrix)


def svd(
    matrix: Float[Tensor, "*stack m n"],
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack k"], Float[Tensor, "*stack k n"]]:
    """The thin singular value decomposition, with orthonormal vectors for zero values too."""
    if not _stays(matrix):
        return _on_host(lambda one: torch.linalg.svd(one, full_matrices=False), matrix)
    # CUDA's default is Jacobi's method, which does not promise them for singular matrices.
    jacobi = matrix.device.type == "cuda" and "cuda" not in choice.LAPACK_DEVICES
    return torch.linalg.svd(matrix, full_matrices=False, driver="gesvd" if jacobi else None)


def _stays(matrix: Tensor) -> bool:
    large = max(matrix.shape[-2:]) > choice.HOST_DIMENSION
    return large or matrix.device.type in choice.LAPACK_DEVICES


def _on_host(function: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor) -> tuple:
    """`function` of every matrix of the stack, a core each."""
    stack = matrix.shape[:-2]
    members = matrix.to("cpu").reshape(-1, *matrix.shape[-2:])
    threads = min(len(members), torch.get_num_threads())
    if threads <= 1:
        results = [function(member) for member in members]
    else:
        before = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results = list(pool.map(function, members))
        torch.set_num_threads(before)  # threads to come take the number that was set last
    parts = (torch.stack(part) for part in zip(*results, strict=True))
    return tuple(part.reshape(*stack, *part.shape[1:]).to(matrix.device) for part in parts)
