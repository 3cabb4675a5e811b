"""The largest eigenpairs of a positive semi-definite matrix, such as a second moment."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import choice
from lora_init.linalg.decomposition import check, fix_signs
from lora_init.linalg.dense import eigenpairs, has_partial_solver
from lora_init.linalg.krylov import block_width, leading_eigenspace, start_block
from lora_init.linalg.singular import Generators

METHODS = ("auto", "exact", "krylov")


@torch.no_grad()
def top_eigen(
    matrix: Float[Tensor, "*stack n n"],
    rank: int,
    *,
    method: str = "auto",
    generator: Generators | None = None,
) -> tuple[Float[Tensor, "*stack rank"], Float[Tensor, "*stack n rank"]]:
    """Return the `rank` largest eigenpairs of a symmetric PSD matrix, eigenvalues descending.

    Computed in float64: the spectrum of a second moment falls by more decades than float32 has
    digits. Methods: "exact", a (partial) dense eigendecomposition; "krylov", a block Krylov space
    that ends when every single value is at rest (see `krylov`); "auto", by size and rank.

    Args:
        matrix: (n, n), symmetric positive semi-definite, float32 or float64; or a stack of such.
        rank: 1 to n.
        generator: as `top_singular`.

    Returns:
        Values (*stack, rank) and vectors (*stack, n, rank) in the matrix's dtype; the entry of
        largest magnitude of each vector is positive. Eigenvalues that rounding made negative are
        returned as 0.

    Raises:
        ValueError: `matrix` is not a square float matrix, or an argument is not allowed.
    """
    check(matrix, rank)
    n = matrix.shape[-1]
    if matrix.shape[-2] != n:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; top_eigen needs a square one.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed are {', '.join(METHODS)}.")
    exact = matrix.double()
    dense = choice.PARTIAL_FIRST if has_partial_solver(exact) else choice.DENSE_DIMENSION
    small = n <= dense or rank > choice.DENSE_SHARE * n
    values = None
    if method == "krylov" or (method == "auto" and not small):
        block = start_block(
            exact.shape[:-1], block_width(rank, n), generator, None,
            dtype=exact.dtype, device=exact.device,
        )  # fmt: skip
        found = leading_eigenspace(lambda block: exact @ block, block, rank, each=True)
        if found is not None and found.converged:
            values, vectors = found.values, torch.linalg.qr(found.vectors)[0]
    if values is None:
        values, vectors = eigenpairs(exact, n - rank, n)
        values, vectors = values.flip(-1), vectors.flip(-1)
    vectors = fix_signs(vectors, vectors)[0]
    return values.clamp_min(0).to(matrix.dtype), vectors.to(matrix.dtype)
