"""Which algorithm answers, and when it may stop: thresholds, and the measurements behind them.

Milliseconds of one core (AMD EPYC, float32, r = 16, a machine with other work on it, so that only
large differences count):

| matrix | Gram matrix | dense eigensolver on it | Krylov space on it | Krylov space on W |
|---|---|---|---|---|
| SmolLM2 k_proj, 192 × 576 | 1 | 3 (float64) | – | – |
| SmolLM2 q_proj, 576 × 576 | 4 | 23 | 8 | 10 |
| SmolLM2 gate_proj, 1536 × 576 | 7 | 23 | 8 | 17 |
| a quantiser's error, 1536 × 576, cold / warm | 7 | 23 | 6 / – | 12 / 7 |

The same of one core of an Intel Xeon, float64, a spectrum that falls like 1 / i, all eigenvectors
by torch, r of them by LAPACK's partial solver, by a Krylov space; then the whole of the last 16
triplets of a square matrix by inverses:

| n | all | 16 first | 32 first | Krylov 16 | Krylov 32 | 16 last, inverses |
|---|---|---|---|---|---|---|
| 256 | 5 | 4 | 6 | – | – | 9 |
| 384 | 14 | 9 | 11 | 7 | 18 | 15 |
| 512 | 32 | 17 | 21 | 9 | 22 | 24 |
| 576, inputs of SmolLM2 / its weights | 54 | 21 | 28 | – | 28 to 66 | 44, 95 if 1536 × 576 |
| 768 | 94 | 43 | 49 | 14 | 32 | 54 |
| 1024 | 212 | 118 | 143 | 33 | 64 | 118 |
| 1536 | 868 | 419 | 419 | 47 | 134 to 253 | 346 |

Hence a dense solver up to 256, and where LAPACK's partial one can be had up to 640 for the first
pairs and 768 for the last; else the Gram matrix up to 1024 where the start is cold, products with W
above and where it is warm. Of SmolLM2's 210 matrices the worst excess Frobenius error was 1.5e-5.
The last 16 triplets of a 2048 × 2048 matrix with s_i = i^-0.7 take 0.7 s of two cores with a shift;
without it no space of the inverse converges.

The last 16 eigenpairs of the second moment of 8 n inputs, and of n / 2, which leave a null space:
milliseconds of one core, two from 2048 on.

| n | partial solver | inverse | partial solver, n / 2 | inverse, n / 2 |
|---|---|---|---|---|
| 576 | 21 | 92 | 19 | 17 |
| 1024 | 122 | 438 | 137 | 69 |
| 1536 | 437 | 1145 | 479 | 190 |
| 2048 | 1101 | 2290 | 997 | 262 |
| 3072 | 3782 | 6669 | 4305 | 644 |

Hence the solver up to 2048; above, the inverse takes up to twice as long where every direction is
used, and a seventh where not.
Nothing here was measured on a GPU.
"""

from __future__ import annotations

import torch

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
