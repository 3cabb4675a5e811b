"""Gram matrices, and dense eigensolvers for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import scipy.linalg
import torch
from jaxtyping import Float
from threadpoolctl import ThreadpoolController
from torch import Tensor

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
    for rows in tall.split(GRAM_ROWS, dim=-2):
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
    return alone and min(matrix.shape) >= PARTIAL_DIMENSION


def eigenpairs(
    matrix: Float[Tensor, "*stack n n"], first: int, last: int
) -> tuple[Float[Tensor, "*stack k"], Float[Tensor, "*stack n k"]]:
    """Eigenpairs first … last-1 of a symmetric matrix, ascending."""
    n = matrix.shape[-1]
    if not has_partial_solver(matrix) or 4 * (last - first) > n:
        values, vectors = eigh(matrix)
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


OVERSAMPLING = 8

# Where LAPACK decomposes and solves. Elsewhere stacks are worked on by products (see `thin`).
LAPACK_DEVICES = ("cpu",)
# The largest entry of QᵀQ - I that a first pass of Cholesky's method may leave for the second.
LARGEST_CORRECTION = 0.1
# Up to this size the host solves an accelerator's dense eigenproblems: one core takes 0.8 ms for 96
# and 36 ms for 544, a large GPU 3.6 and 12, one matrix after another.
HOST_DIMENSION = 640

# Rows of the matrix that are widened at a time.
GRAM_ROWS = 4096
# Dense solvers take the Gram matrix up to this size, and above this share of it.
DENSE_DIMENSION = 256
DENSE_SHARE = 0.1
# Up to this smaller side, Krylov multiplies by the Gram matrix; above, by W and its transpose.
GRAM_DIMENSION = 1024
# From this size on LAPACK's partial eigensolver beats the full one of torch, and up to these sizes
# a Krylov space for the first pairs and one of an inverse for the last.
PARTIAL_DIMENSION = 384
PARTIAL_FIRST = 640
PARTIAL_LAST = 768
# The same for the last pairs of a matrix that is no Gram matrix.
PARTIAL_LAST_PAIRS = 2048

# A Krylov space ends when it expects to gain no more than this share of the squared error (the
# error's own excess is half of it), or when no vector's angle to its true direction is larger.
KRYLOV_TOLERANCE = 5e-5
ANGLE_TOLERANCE = 1e-4
KRYLOV_ROUNDS = 16
# It gives up before where the last rounds' trend says so, at the earliest here: of n = 1024 and
# ranks 16 and 32, spectra i^-0.1 and steeper need 2 to 9 rounds and fall by a third of a decade or
# more in each, and those of random inputs are 1 to 2 decades away after 16.
FIRST_FORECAST = 6
TREND = 3
# It never grows beyond this share of the whole space, where a dense solver is as good.
SPACE_SHARE = 0.6

# The share of ‖W‖² missing below which products in this precision cannot tell a 1e-4 excess any
# more, and more careful arithmetic takes over.
RESOLUTION = {torch.float32: 1e-3, torch.float64: 2e-8}
# The same where nothing is squared.
PRODUCT_RESOLUTION = {torch.float32: 3e-7, torch.float64: 1e-9}
# A gain, as a share of ‖W‖², that is rounding.
ROUNDING = {torch.float32: 1e-7, torch.float64: 1e-14}
# Rounds with an inverse, after which a shift of the spectrum is worth its Cholesky decomposition.
ROUNDS_BEFORE_SHIFT = 3
# Products with an inverse between two restarts, from the size on where they cost more than the
# eigenproblem of a longer basis.
INVERSE_PRODUCTS = 32
INVERSE_DIMENSION = 2048
# The smallest eigenvalue of a Gram matrix, as a share of the largest, that squares can tell.
BOTTOM_RESOLUTION = 1e-12
# The smallest pivot of a triangle, as a share of s_1, below which a matrix counts as singular.
PIVOT_RESOLUTION = 1e-14

# Columns that a kernel for thin products works on at once: 16 take less time than 8 do.
BLOCK_COLUMNS = 16
# The smallest wanted singular value, as a share of the largest, that powers of W^T W can tell where
# nothing is orthogonalised between W and W^T.
POWERS_RESOLUTION = 1e-2


def nesting_rank(rank: int, limit: int) -> int:
    """The rank to decompose for `rank`: its next power of two, at least 16, at most `limit`.

    A partial decomposition depends in its last digits on how many triplets were asked for. Rounded
    up, neighbouring ranks share one, whose first `rank` triplets each of them takes.
    """
    return min(limit, max(16, 1 << (rank - 1).bit_length()))


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
    jacobi = matrix.device.type == "cuda" and "cuda" not in LAPACK_DEVICES
    return torch.linalg.svd(matrix, full_matrices=False, driver="gesvd" if jacobi else None)


def _stays(matrix: Tensor) -> bool:
    large = max(matrix.shape[-2:]) > HOST_DIMENSION
    return large or matrix.device.type in LAPACK_DEVICES


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
