"""Which algorithm answers, and when it may stop: thresholds, and the measurements behind them.

Milliseconds of one core (AMD EPYC, float32, r = 16, a machine with other work on it, so that only
large differences count):

| matrix | Gram matrix | dense eigensolver on it | Krylov space on it | Krylov space on W |
|---|---|---|---|---|
| SmolLM2 k_proj, 192 × 576 | 1 | 3 (float64) | – | – |
| SmolLM2 q_proj, 576 × 576 | 4 | 23 | 8 | 10 |
| SmolLM2 gate_proj, 1536 × 576 | 7 | 23 | 8 | 17 |
| a quantiser's error, 1536 × 576, cold / warm | 7 | 23 | 6 / – | 12 / 7 |

Hence a dense solver up to 256, the Gram matrix up to 1024 where the start is cold, products with W
above and where it is warm. Of SmolLM2's 210 matrices the worst excess Frobenius error was 1.5e-5.
The last 16 triplets of a 2048 × 2048 matrix with s_i = i^-0.7 take 0.7 s of two cores with a shift;
without it no space of the inverse converges. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import torch

OVERSAMPLING = 8

# Rows of the matrix that are widened at a time.
GRAM_ROWS = 4096
# Dense solvers take the Gram matrix up to this size, and above this share of it.
DENSE_DIMENSION = 256
DENSE_SHARE = 0.1
# Up to this smaller side, Krylov multiplies by the Gram matrix; above, by W and its transpose.
GRAM_DIMENSION = 1024
# From this size on LAPACK's partial eigensolver beats the full one of torch.
PARTIAL_DIMENSION = 768

# A Krylov space ends when it expects to gain no more than this share of the squared error (the
# error's own excess is half of it), or when no vector's angle to its true direction is larger.
KRYLOV_TOLERANCE = 5e-5
ANGLE_TOLERANCE = 1e-4
KRYLOV_ROUNDS = 16
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
