"""Approximate triplets for a given number N of power iterations, as in `torch.svd_lowrank`.

There are two ways to spend N. `by_iterations` multiplies N times by ``W^T W`` and keeps the last
block. `by_powers` keeps every block: the space span{X, W^T W X, …, (W^T W)^q X} contains a
Chebyshev polynomial of W^T W, which grows with the square root of a gap where a power grows with
the gap itself. N powers gain a factor g = (1 + gap)^N. A space gains as much in
q = (ln g + ln 2) / (2 sqrt(ln g)) sqrt(N) steps, at most sqrt(2 N) up to g = 600; beyond that a
triplet has converged either way.

Source: Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1; Musco & Musco 2015, section 2.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_init.linalg import dense
from lora_init.linalg.decomposition import (
    Decomposition,
    fix_signs,
    from_right,
    relative,
    rotated,
    swapped,
)
from lora_init.linalg.draws import Generators
from lora_init.linalg.krylov import block_width, rounding_noise, start_block
from lora_init.linalg.operators import Operator
from lora_init.linalg.thin import thin_qr

BLOCK_COLUMNS = 16
"""Kernels for thin products work on this many columns at once; fewer take no less time."""
RESOLUTION = 1e-2
"""The smallest wanted value, as a share of s_1, that products with W^T W resolve in float32."""


def by_powers(
    operator: Operator,
    rank: int,
    niter: int,
    generator: Generators | None,
    start: Tensor | None,
) -> Decomposition:
    """Return triplets at least as good as those of `niter` power iterations, by fewer products.

    If the values fall too far for float32 products with ``W^T W``, `by_iterations` answers.
    """
    *stack, m, n = operator.shape
    width = BLOCK_COLUMNS * math.ceil(rank / BLOCK_COLUMNS)
    size = (math.ceil(math.sqrt(2 * niter)) + 1) * width
    found = None
    if size <= min(m, n):
        block = start_block(
            (*stack, n), width, generator, start, dtype=operator.dtype, device=operator.device
        )
        basis, images, backs = _krylov_space(operator, block, size)
        found = _ritz_pairs(basis, images, rank)
    if found is None:
        return by_iterations(operator, rank, niter, generator, start)
    values, vectors = found
    largest = values[..., -1]
    left, triangle = thin_qr(images @ vectors)  # the triangle is diagonal: W V = U S
    # W^T U = W^T (W V) triangle^-1 from the products at hand. The values of the triangle span
    # 1 / `RESOLUTION` at most, so rounding grows by no more than that.
    backward = torch.linalg.solve_triangular(triangle, backs @ vectors, upper=True, left=False)
    expected = (basis @ vectors) * triangle.diagonal(dim1=-2, dim2=-1)[..., None, :]
    error = torch.linalg.vector_norm(backward - expected, dim=-2, dtype=torch.float64).amax(-1)
    # A last half step, as in PEFT: W on the range of U.
    right, values, left = rotated(left, backward)
    left, right = (t.contiguous() for t in fix_signs(left, right))
    values, residual = values.contiguous(), relative(error, largest)
    return Decomposition(left, values, right, "powers", residual, values[..., 0].double())


def by_iterations(
    operator: Operator,
    rank: int,
    niter: int,
    generator: Generators | None,
    start: Tensor | None,
) -> Decomposition:
    """Return triplets of W on the range of ``W X`` after ``X <- W^T W X``, exactly `niter` times.

    The block is wider than `rank`. N still counts multiplications, and a larger subspace only
    improves the result.
    """
    *stack, m, n = operator.shape
    width = block_width(rank, min(m, n))
    block = start_block(
        (*stack, n), width, generator, start, dtype=operator.dtype, device=operator.device
    )
    for _ in range(niter):
        block, _ = thin_qr(operator.matmul(block))
        block, _ = thin_qr(operator.rmatmul(block))
    left, _ = thin_qr(operator.matmul(block))
    return swapped(from_right(operator.transpose, left, "subspace", rank=rank))


def _krylov_space(operator: Operator, block: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a nearly orthonormal basis V of `size` columns, W V and W^T W V."""
    *stack, m, n = operator.shape
    width = block.shape[-1]
    basis = block.new_empty(*stack, n, size)
    images = block.new_empty(*stack, m, size)
    backs = torch.empty_like(basis)
    noise = rounding_noise(block)
    for used in range(0, size, width):
        known = basis[..., : used + width]
        known[..., used:] = block
        image, block = operator.there_and_back(block)
        images[..., used : used + width], backs[..., used : used + width] = image, block
        if used + width < size:
            coefficients = known.mT @ block
            noise = noise.roll(1, dims=-2)  # shifted rows are new directions
            scale = coefficients.abs().amax((-2, -1), keepdim=True)
            # One projection leaves its rounding behind, which `_ritz_pairs` allows for.
            block, _ = thin_qr(block - known @ coefficients + scale * noise)
    return basis, images, backs


def _ritz_pairs(basis: Tensor, images: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return the `rank` best singular values of W on the span of V, ascending, in float64.

    Also return the coefficients of their right vectors: ``(W V)^T (W V) z = s² V^T V z``. None if
    V's columns are dependent or the values fall below `RESOLUTION`.
    """
    triangle, failed = torch.linalg.cholesky_ex((basis.mT @ basis).double())
    if bool(failed.any()):
        return None
    wide = images.double()
    whitened = torch.linalg.solve_triangular(triangle, wide.mT @ wide, upper=False)
    whitened = torch.linalg.solve_triangular(triangle, whitened.mT, upper=False)
    squares, vectors = dense.eigh(whitened)
    vectors = torch.linalg.solve_triangular(triangle.mT, vectors[..., -rank:], upper=True)
    values = squares[..., -rank:].clamp_min(0).sqrt()
    if bool((values[..., 0] < RESOLUTION * values[..., -1]).any()):
        return None
    return values, vectors.to(basis.dtype)
