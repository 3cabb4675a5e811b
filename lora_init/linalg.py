"""Partial decompositions: the few singular triplets that an initializer wants, and no more.

Seeded (a test block is drawn on the CPU), deterministic on a device, free of global state. One
matrix a call; leading batch dimensions are refused for now.

Why "auto" chooses as it does: best of two runs, 2 CPU cores, float32, milliseconds for r = 16 / 64
("–": the Krylov space reached its limit and the Gram matrix answered). Power law: s_i = i^-0.7.

| matrix | gram | krylov | LAPACK |
|---|---|---|---|
| MiniLM attention, 384 × 384 | 8 / 28 | 13–33 / – | 19 |
| MiniLM feed-forward, 1536 × 384 | 22 / 40 | 17–27 / – | 40 |
| MiniLM embedding, 30522 × 384 | 300 / 370 | 230 / – | |
| power law, 768 × 768 | 59 / 90 | 28 / 78 | 87 |
| gaussian, 768 × 768 | 43 / 81 | 44 / 158 | 87 |
| power law, 1024 × 1024 | 100 / 125 | 39 / 75 | 300 |
| gaussian, 1024 × 1024 | 92 / 121 | 65 / 245 | 300 |
| power law, 2048 × 2048 | 617 / 685 | 61 / 181 | 1490 |
| gaussian, 2048 × 2048 | 591 / 611 | 193 / 679 | 1490 |
| power law, 5632 × 2048 | 936 / 1053 | 155 / 333 | |

Krylov's excess Frobenius error was at most 4e-7 in all of these, and 2e-6 on 1000 × 1000 matrices
with flat, clustered, stepped and outlying spectra; real matrices are nearer to the gaussian than to
the power law. Hence: Gram up to a smaller side of 768, where the two tie on flat spectra, and above
5 % of it. Of the dense solvers for the Gram matrix, LAPACK's partial one takes 310 ms at 2048,
torch's full one 1150. Eigenvectors of a 2048 × 2048 second moment: partial 350, krylov 50; at 1536,
120 and 45. The thresholds were not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import scipy.linalg
import torch
from jaxtyping import Float
from threadpoolctl import ThreadpoolController
from torch import Tensor

METHODS = ("auto", "exact", "gram", "krylov", "subspace")
OVERSAMPLING = 8

# Rows of the matrix that are float64 at a time.
GRAM_ROWS = 4096
# "auto" squares the matrix up to this smaller dimension, and above this share of it.
GRAM_DIMENSION = 768
GRAM_FRACTION = 0.05
# top_eigen's "auto" decomposes the whole matrix up to this size.
EIGH_DIMENSION = 1536

# Krylov stops when a step captures less than this share of the squared error that is left.
KRYLOV_TOLERANCE = 1e-6
KRYLOV_STEPS = 24

# The squared error, as a share of ‖W‖², below which products in this precision cannot tell a
# 1e-4 excess any more, and more careful arithmetic takes over.
RESOLUTION = {torch.float32: 1e-4, torch.float64: 1e-9}
# A Krylov step's gain, as a share of ‖W‖², that is rounding (measured on outliers of 1e4).
ROUNDING = {torch.float32: 2e-9, torch.float64: 1e-14}
# The smallest eigenvalue of a Gram matrix, as a share of the largest, that bottom_singular trusts.
BOTTOM_RESOLUTION = 1e-12


@dataclass(frozen=True)
class Decomposition:
    """The triplets ``matrix @ right = left * values`` and ``matrix.T @ left = right * values``.

    Attributes:
        left: (m, k), orthonormal columns.
        values: (k,), descending from `top_singular`, ascending from `bottom_singular`.
        right: (n, k), orthonormal columns: the right singular vectors are columns, not rows.
        method: what computed it: "exact", "gram", "krylov" or "subspace".
        residual: the largest ``‖W v_i - s_i u_i‖`` or ``‖W^T u_i - s_i v_i‖``, divided by s_1;
            0 for a zero matrix.
    """

    left: Float[Tensor, "m k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "n k"]
    method: str
    residual: float


@dataclass(frozen=True)
class Operator:
    """A linear map known by its products only.

    Attributes:
        shape: (m, n).
        matmul: (n, k) -> (m, k).
        rmatmul: (m, k) -> (n, k), the product with the transpose.
        dtype: of the blocks both take and return, float32 or float64.
        device: where the blocks live.
        upcast: makes the same map in float64, for spectra that float32 cannot resolve; without it
            such a map is formed as a matrix.
    """

    shape: tuple[int, int]
    matmul: Callable[[Tensor], Tensor]
    rmatmul: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    device: torch.device
    upcast: Callable[[], Operator] | None = None

    @classmethod
    def product(cls, first: Float[Tensor, "m j"], second: Float[Tensor, "j n"]) -> Operator:
        """``x -> first (second x)``, without forming the product.

        Forming it costs as much as n single products; a partial decomposition needs a few hundred.

        Raises:
            ValueError: the inner dimensions or the dtypes differ.
        """
        if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[0]:
            raise ValueError(
                f"Operator.product got shapes {tuple(first.shape)} and {tuple(second.shape)}; "
                "allowed are two matrices (m, j) and (j, n) with the same j."
            )
        if first.dtype != second.dtype:
            raise ValueError(
                f"Operator.product got dtypes {first.dtype} and {second.dtype}; cast one of them."
            )
        return cls(
            shape=(first.shape[0], second.shape[1]),
            matmul=lambda block: first @ (second @ block),
            rmatmul=lambda block: second.T @ (first.T @ block),
            dtype=first.dtype,
            device=first.device,
            upcast=lambda: cls.product(first.double(), second.double()),
        )

    @classmethod
    def dense(cls, matrix: Float[Tensor, "m n"]) -> Operator:
        """``x -> matrix x``."""
        return cls(
            shape=(matrix.shape[0], matrix.shape[1]),
            matmul=lambda block: matrix @ block,
            rmatmul=lambda block: matrix.T @ block,
            dtype=matrix.dtype,
            device=matrix.device,
            upcast=lambda: cls.dense(matrix.double()),
        )

    def to_dense(self) -> Float[Tensor, "m n"]:
        """The matrix itself, from products with the identity of its smaller side."""
        m, n = self.shape
        identity = torch.eye(min(m, n), dtype=self.dtype, device=self.device)
        return self.matmul(identity) if n <= m else self.rmatmul(identity).T

    # Blocks are float64 on our side whatever the matrix is: they are thin, so it costs little, and
    # energies that differ by less than float32's epsilon decide when to stop.

    def _times(self, block: Tensor) -> Tensor:
        return self.matmul(block.to(self.dtype)).double()

    def _transposed_times(self, block: Tensor) -> Tensor:
        return self.rmatmul(block.to(self.dtype)).double()


@torch.no_grad()
def top_singular(
    matrix: Float[Tensor, "m n"] | Operator,
    rank: int,
    *,
    method: str = "auto",
    niter: int | None = None,
    generator: torch.Generator | None = None,
    start: Float[Tensor, "n k"] | None = None,
) -> Decomposition:
    """Return the `rank` largest singular triplets, values descending.

    Methods:
        - "exact": LAPACK's SVD, cut.
        - "gram": eigenvectors of the smaller of ``W W^T`` and ``W^T W``, accumulated in float64,
          then one Rayleigh-Ritz step with W itself.
        - "krylov": block Krylov space of ``W^T W``, fully re-orthogonalised, grown until a step
          no longer pays (see `KRYLOV_TOLERANCE`).
        - "subspace": exactly `niter` power iterations ``X <- W^T W X`` from a random block, as
          `torch.svd_lowrank`. N counts multiplications, so a block wider than `rank` (here by
          `OVERSAMPLING`, cut off at the end) leaves its meaning alone: it buys accuracy at the
          same N, and never less, as the Ritz values of a larger subspace are no smaller.
        - "auto": "gram" or "krylov" by shape and rank; "subspace" when `niter` is given.

    "gram" and "krylov" keep the Frobenius error of the rank-r approximation within 1e-4 (relative)
    of the optimum, plus the rounding of the matrix's own dtype. Where they cannot (no convergence,
    or a tail so small that squaring loses it) the next more careful method answers, and the
    result's `method` says which one did.

    Args:
        matrix: (m, n), float32 or float64, any device; or an `Operator`.
        rank: 1 to min(m, n).
        niter: the number of power iterations of "subspace"; other methods take none.
        generator: a CPU generator for the test block, drawn in float32 and then moved, so that
            the result does not depend on the device. None: a fresh one with seed 0.
        start: columns to begin with ("krylov" and "subspace"; the others ignore them), such as the
            last `right` of a matrix that has changed little; random ones are added.

    Returns:
        A `Decomposition` in the matrix's dtype, signs fixed by `fix_signs`.

    Raises:
        ValueError: `matrix` is not a 2-D float32 or float64 tensor, or an argument is outside the
            values above.

    References:
        Halko, Martinsson & Tropp 2011 (subspace iteration); Musco & Musco 2015 (block Krylov).
    """
    _check(matrix, rank)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed are {', '.join(METHODS)}.")
    if niter is not None and method not in ("auto", "subspace"):
        raise ValueError(f"niter={niter} has no meaning for method={method!r}; use 'subspace'.")
    if niter is None and method == "subspace":
        raise ValueError("method='subspace' needs niter, a number of power iterations (0, 1, …).")
    if niter is not None and (isinstance(niter, bool) or not isinstance(niter, int) or niter < 0):
        raise ValueError(f"niter={niter!r} is not allowed; give an integer of at least 0.")
    m, n = matrix.shape
    if start is not None and (start.ndim != 2 or start.shape[0] != n):
        raise ValueError(
            f"start has shape {tuple(start.shape)}; allowed is ({n}, k), n as in the matrix."
        )

    operator = matrix if isinstance(matrix, Operator) else Operator.dense(matrix)
    if niter is not None:
        triplets = _subspace(operator, rank, niter, generator, start)
        return _decomposition(operator, *triplets, "subspace")
    if method == "auto":
        small = min(m, n) <= GRAM_DIMENSION or rank > GRAM_FRACTION * min(m, n)
        method = "gram" if small else "krylov"
    if method == "krylov":
        triplets = _krylov(matrix, rank, generator, start)
        if triplets is not None:
            return _decomposition(operator, *triplets, "krylov")
    dense = matrix
    if isinstance(matrix, Operator):
        # A product's spectrum falls like both factors' together: it is formed in float64.
        dense = (matrix.upcast() if matrix.upcast is not None else matrix).to_dense()
    if method != "exact":
        triplets = _gram(dense, rank)
        if triplets is not None:
            return _decomposition(operator, *triplets, "gram")
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    return _decomposition(operator, left[:, :rank], values[:rank], right[:rank].T, "exact")


@torch.no_grad()
def bottom_singular(matrix: Float[Tensor, "m n"], rank: int) -> Decomposition:
    """Return the last `rank` triplets of the thin SVD, values ascending, computed in float64.

    The thin SVD has min(m, n) triplets, so the Gram matrix of the smaller side is the one to use:
    the smallest eigenvectors of the larger one span W's null space, which no thin SVD contains.
    Eigenvalues are squares, hence a value below 1e-6 s_1 is lost in them to rounding; matrices with
    such a tail, the rank-deficient ones among them, get LAPACK's SVD instead.

    Args:
        matrix: (m, n), float32 or float64, any device.
        rank: 1 to min(m, n).

    Returns:
        A `Decomposition` in the matrix's dtype, signs fixed by `fix_signs`.

    Raises:
        ValueError: as `top_singular`.
    """
    _check(matrix, rank)
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.double().T if wide else matrix.double()
    gram = _smaller_gram(tall)
    squares, vectors = _eigh(gram, 0, rank)
    # Eight power iterations give s_1² well within the margins of its two uses here.
    largest_square = _subspace(Operator.dense(gram), 1, 8, None, None)[1][0]
    if squares[0] > BOTTOM_RESOLUTION * largest_square:
        # One-sided: a product with W^T would amplify what little of v_1 the vectors contain.
        basis, triangle = torch.linalg.qr(tall @ vectors)
        left, values, right = torch.linalg.svd(triangle)
        left, right, method = basis @ left, vectors @ right.T, "gram"
    else:
        left, values, right = torch.linalg.svd(tall, full_matrices=False)
        left, values, right, method = left[:, -rank:], values[-rank:], right[-rank:].T, "exact"
    left, values, right = left.flip(1), values.flip(0), right.flip(1)
    if wide:
        left, right = right, left
    operator = Operator.dense(tall.T if wide else tall)
    found = _decomposition(operator, left, values, right, method, largest_square.sqrt())
    return replace(
        found,
        left=found.left.to(matrix.dtype),
        values=found.values.to(matrix.dtype),
        right=found.right.to(matrix.dtype),
    )


@torch.no_grad()
def top_eigen(
    matrix: Float[Tensor, "n n"],
    rank: int,
    *,
    method: str = "auto",
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, " rank"], Float[Tensor, "n rank"]]:
    """Return the `rank` largest eigenpairs of a symmetric PSD matrix, eigenvalues descending.

    Methods: "exact", a (partial) dense eigendecomposition in float64; "krylov", as `top_singular`,
    whose triplets are the eigenpairs of a PSD matrix; "auto", by size and rank.

    Args:
        matrix: (n, n), symmetric positive semi-definite, float32 or float64. Symmetry is the
            caller's promise: only one triangle is read.
        rank: 1 to n.
        generator: as `top_singular`.

    Returns:
        Values (rank,) and vectors (n, rank) in the matrix's dtype; the entry of largest magnitude
        of each vector is positive. Eigenvalues that rounding made negative are returned as 0.

    Raises:
        ValueError: `matrix` is not a square float matrix, or an argument is not allowed.
    """
    _check(matrix, rank)
    n = matrix.shape[0]
    if matrix.shape[1] != n:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; top_eigen needs a square one.")
    if method not in ("auto", "exact", "krylov"):
        raise ValueError(f"method={method!r} is unknown; allowed are auto, exact, krylov.")
    if method == "krylov" or (method == "auto" and n > EIGH_DIMENSION and rank < GRAM_FRACTION * n):
        triplets = _krylov(matrix, rank, generator, None)
        if triplets is not None:
            _, values, vectors = triplets
            return values.to(matrix.dtype), fix_signs(vectors, vectors)[0].to(matrix.dtype)
    values, vectors = _eigh(matrix.double(), n - rank, n)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return values.to(matrix.dtype), fix_signs(vectors, vectors)[0].to(matrix.dtype)


@torch.no_grad()
def leading_qr(
    matrix: Float[Tensor, "m n"], rank: int
) -> tuple[Float[Tensor, "m rank"], Float[Tensor, "rank n"]]:
    """Return the first `rank` columns of Q and rows of R, of the thin QR of the whole matrix.

    Column j of Q depends on the first j columns of W only, so ``Q = qr(W[:, :r])`` and
    ``R = Q^T W`` are the same factors in O(m n r). Signs are LAPACK's.

    Raises:
        ValueError: as `top_singular`.
    """
    _check(matrix, rank)
    basis, triangle = torch.linalg.qr(matrix[:, :rank])
    return basis, torch.cat([triangle, basis.T @ matrix[:, rank:]], dim=1)


def fix_signs(
    left: Float[Tensor, "m k"], right: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "n k"]]:
    """Flip pairs of columns so that each left vector's entry of largest magnitude is positive.

    On ties the first such entry counts. ``left @ diag @ right.T`` stays the same.
    """
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return left * signs, right * signs


def _check(matrix: Tensor | Operator, rank: int) -> None:
    if isinstance(matrix, Tensor) and matrix.ndim != 2:
        raise ValueError(
            f"matrix has shape {tuple(matrix.shape)}; allowed is (m, n). Decompose a stack of "
            "matrices one by one."
        )
    if matrix.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"matrix has dtype {matrix.dtype}; allowed are float32 and float64: call .float()."
        )
    limit = min(matrix.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= limit:
        raise ValueError(
            f"rank={rank!r} is not allowed for a {matrix.shape[0]} x {matrix.shape[1]} matrix; "
            f"give an integer from 1 to {limit}."
        )


@cache
def _openblas() -> ThreadpoolController:
    """scipy's own thread pool. Its threads and torch's wait for work by spinning, on the same
    cores: two threads here make an eigendecomposition between torch's products 1.6 to 2.3 times
    slower than one (2 cores, n = 384 to 2048).
    """
    return ThreadpoolController().select(internal_api="openblas")


def _eigh(matrix: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Eigenpairs first … last-1 of a symmetric float64 matrix, ascending."""
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
        return values[first:last], vectors[:, first:last]
    # torch has no partial solver; LAPACK's computes r vectors in a quarter of the time of all.
    with _openblas().limit(limits=1):
        values, vectors = scipy.linalg.eigh(
            matrix.detach().numpy(), subset_by_index=[first, last - 1]
        )
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _start_block(
    operator: Operator, width: int, generator: torch.Generator | None, start: Tensor | None
) -> Tensor:
    """Orthonormal float64 columns (n, width): those of `start`, then random ones."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    n = operator.shape[1]
    block = torch.randn(n, width, generator=generator).to(operator.device).double()
    if start is not None:
        known = start[:, :width].to(block)
        block[:, : known.shape[1]] = known
    return torch.linalg.qr(block)[0]


def _rayleigh_ritz(operator: Operator, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets from the range of ``W basis``; orthonormal also where W vanishes on the basis.

    Householder's QR completes a rank-deficient block to an orthonormal one, so that null
    directions yield vectors and no NaN.
    """
    left, _ = torch.linalg.qr(operator._times(basis))
    inner, values, right = torch.linalg.svd(operator._transposed_times(left).T, full_matrices=False)
    return left @ inner, values, right.T


def _decomposition(
    operator: Operator,
    left: Tensor,
    values: Tensor,
    right: Tensor,
    method: str,
    largest: Tensor | None = None,
) -> Decomposition:
    """Fix the signs, measure the residual relative to `largest` (s_1), cast to the dtype."""
    left, right = fix_signs(left, right)
    forward = operator._times(right) - left.double() * values.double()
    backward = operator._transposed_times(left) - right.double() * values.double()
    error = torch.maximum(forward.norm(dim=0), backward.norm(dim=0)).max().item()
    scale = (values[0] if largest is None else largest).item()
    return Decomposition(
        left=left.to(operator.dtype).contiguous(),
        values=values.to(operator.dtype).contiguous(),
        right=right.to(operator.dtype).contiguous(),
        method=method,
        residual=error / scale if scale > 0 else 0.0,
    )


def _subspace(
    operator: Operator,
    rank: int,
    niter: int,
    generator: torch.Generator | None,
    start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    width = min(rank + OVERSAMPLING, *operator.shape)
    basis = _start_block(operator, width, generator, start)
    for _ in range(niter):
        left, _ = torch.linalg.qr(operator._times(basis))
        basis, _ = torch.linalg.qr(operator._transposed_times(left))
    left, values, right = _rayleigh_ritz(operator, basis)
    return left[:, :rank], values[:rank], right[:, :rank]


def _smaller_gram(matrix: Tensor) -> Tensor:
    """``W^T W`` or ``W W^T``, the smaller, in float64 without a float64 copy of all of W."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    gram = tall.new_zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in tall.split(GRAM_ROWS):
        rows = rows.double()
        gram.addmm_(rows.T, rows)
    return gram


def _gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Top triplets by the smaller Gram matrix, or None where float64 cannot resolve the tail."""
    gram = _smaller_gram(matrix)
    size = gram.shape[0]
    _, vectors = _eigh(gram, size - rank, size)
    wide = matrix.shape[0] < matrix.shape[1]
    tall = Operator.dense(matrix.T if wide else matrix)
    left, values, right = _rayleigh_ritz(tall, vectors.flip(1))
    missing = gram.trace() - values.square().sum()
    if matrix.dtype == torch.float64 and missing <= RESOLUTION[torch.float64] * gram.trace():
        return None
    return (right, values, left) if wide else (left, values, right)


def _krylov(
    matrix: Tensor | Operator,
    rank: int,
    generator: torch.Generator | None,
    start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Top triplets from a block Krylov space, or None where it is no better than the whole."""
    if isinstance(matrix, Operator):
        operator, energy = matrix, None
    else:
        operator = Operator.dense(matrix)
        energy = torch.linalg.vector_norm(matrix, dtype=torch.float64).square()
    right, missing = _krylov_space(operator, rank, energy, generator, start)
    if right is not None and not missing > RESOLUTION[operator.dtype]:
        if operator.dtype == torch.float64 or operator.upcast is None:
            return None
        # The vectors are nearly right: a few steps in float64 finish them.
        operator = operator.upcast()
        right, _ = _krylov_space(operator, rank, energy, generator, right)
    return None if right is None else _rayleigh_ritz(operator, right)


def _krylov_space(
    operator: Operator,
    rank: int,
    energy: Tensor | None,
    generator: torch.Generator | None,
    start: Tensor | None,
) -> tuple[Tensor | None, float]:
    """Top right singular vectors, and the share of the energy they miss.

    With V the basis and ``T = (W V)^T (W V)``, the eigenvalues of T grow towards those of
    ``W^T W`` as V does, and the squared error is ‖W‖² minus the sum of the first r. Without ‖W‖²
    (an operator) the sum of *all* Ritz values stands in for it: a lower bound, so that the rule
    only gets stricter. The vectors are None when the space reached its limit first.
    """
    m, n = operator.shape
    width = min(rank + OVERSAMPLING, m, n)
    steps = min(KRYLOV_STEPS, min(m, n) // width)
    right = torch.empty(n, steps * width, dtype=torch.float64, device=operator.device)
    projected = right.new_zeros(steps * width, steps * width)
    block, captured = _start_block(operator, width, generator, start), None
    for step in range(steps):
        old, new = step * width, (step + 1) * width
        right[:, old:new] = block
        block = operator._transposed_times(operator._times(block))
        # Gram-Schmidt's coefficients are T's new rows: W V, m rows deep, need not be kept.
        coefficients = right[:, :new].T @ block
        projected[old:new, :new] = coefficients.T
        values, vectors = torch.linalg.eigh(projected[:new, :new], UPLO="L")
        before, captured = captured, values[-rank:].sum()
        total = values.sum() if energy is None else energy
        missing = (total - captured).clamp(min=0)
        enough = torch.maximum(KRYLOV_TOLERANCE * missing, ROUNDING[operator.dtype] * total)
        if before is not None and captured - before <= enough:
            return right[:, :new] @ vectors[:, -rank:].flip(1), (missing / total).item()
        block, _ = torch.linalg.qr(block - right[:, :new] @ coefficients)
        # Once leaves the rounding of the first projection behind, twice is enough.
        block, _ = torch.linalg.qr(block - right[:, :new] @ (right[:, :new].T @ block))
    return None, 0.0
