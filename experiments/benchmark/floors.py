"""What a strategy cannot do without: bytes and operations, over what the machine can move and do.

For a weight m × n, k = min(m, n), rank r, 4 bytes a number. These are bounds of the best way that we
know, not of nature; whatever a method reads or computes besides (norms, checks, orthonormal bases,
small decompositions) is left out, so that no implementation reaches 1.

| strategy | bytes | operations | why |
|---|---|---|---|
| kaiming, gaussian, random, orthogonal | 4·2 r (m + n) | – | A and B and their initial copies |
| subtracting W - s B A | 4·2 mn | 2 mnr | one pass over W, one product |
| olora | 4 mn, and subtracting | 2 mnr + 4 m r² | QR of r columns, A = Qᵀ W |
| pissa | 4·8 mn, and subtracting | 8·2 mnr | four Krylov steps, W and Wᵀ each |
| pissa_niter_N | 4·(2N + 2) mn, and subtracting | (2N + 2)·2 mnr | N steps, first and last product |
| corda ipm | 4·8 (mn + n²), and subtracting | 8·2r (mn + n²) + 2 mnr | the same through R, A = Uᵀ W |
| corda kpm | bottom's, 8 n², and subtracting | bottom's, float64: n³/3 + 8·2 n² r, and 2 mnr | bottom's without forming W R: R's Cholesky factor, its solves |
| bottom | 4 mn + 8 k² | float64: max(m, n) k² + k³/3 + 8·2 k² r | the Gram matrix's triangle, Cholesky, four steps of two solves |
| loftq, T alternations | T·4·4 mn | T·4·2 mnr | quantise: read W, write Q; two warm steps; the residual |
| eva | 4·8 n² | 8·2 n² r | four Krylov steps of two products on the covariance |
| lora_ga | 4·8 mn, and subtracting | 8·2 mn 2r | pissa's, on G, 2r triplets |

A calibration pass is no part of it. eva's n are those of the distinct inputs, not of the layers.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.benchmark.rates import Rates
from experiments.benchmark.strategies import LOFTQ_ITERATIONS

SINGLE, DOUBLE = 4, 8  # bytes
KRYLOV_PRODUCTS = 8
WARM_PRODUCTS = 4


@dataclass(frozen=True)
class Cost:
    """Bytes to move, and operations in float32 and in float64."""

    bytes: float = 0.0
    float32: float = 0.0
    float64: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes, self.float32 + other.float32, self.float64 + other.float64
        )

    def seconds(self, rates: Rates) -> float:
        """Memory and arithmetic at full speed side by side: the slower of the two."""
        arithmetic = self.float32 / rates.float32 + self.float64 / rates.float64
        return max(self.bytes / rates.bandwidth, arithmetic)


def floor(method: str, shapes: Sequence[tuple[int, int]], rank: int, rates: Rates) -> float:
    """Least seconds of `method` on weights of `shapes` (out, in)."""
    return sum((cost(method, m, n, rank) for m, n in shapes), Cost()).seconds(rates)


def cost(method: str, m: int, n: int, r: int) -> Cost:
    if method.startswith("pissa_niter_"):
        count = int(method.removeprefix("pissa_niter_"))
        return products(2 * count + 2, m, n, r) + subtraction(m, n, r)
    return COSTS[method](m, n, r)


def drawing(m: int, n: int, r: int) -> Cost:
    return Cost(bytes=SINGLE * 2 * r * (m + n))


def subtraction(m: int, n: int, r: int) -> Cost:
    return Cost(bytes=SINGLE * 2 * m * n, float32=2 * m * n * r)


def products(count: int, m: int, n: int, r: int) -> Cost:
    """`count` products of the weight with r columns."""
    return Cost(bytes=SINGLE * count * m * n, float32=count * 2 * m * n * r)


def olora(m: int, n: int, r: int) -> Cost:
    return products(1, m, n, r) + Cost(float32=4 * m * r * r) + subtraction(m, n, r)


def pissa(m: int, n: int, r: int) -> Cost:
    return products(KRYLOV_PRODUCTS, m, n, r) + subtraction(m, n, r)


def corda_ipm(m: int, n: int, r: int) -> Cost:
    through = products(KRYLOV_PRODUCTS, m, n, r) + products(KRYLOV_PRODUCTS, n, n, r)
    return through + Cost(float32=2 * m * n * r) + subtraction(m, n, r)


def corda_kpm(m: int, n: int, r: int) -> Cost:
    moment = Cost(bytes=DOUBLE * n * n, float64=n**3 / 3 + KRYLOV_PRODUCTS * 2 * n * n * r)
    return bottom(m, n, r) + moment + subtraction(m, n, r)


def bottom(m: int, n: int, r: int) -> Cost:
    k = min(m, n)
    operations = max(m, n) * k * k + k**3 / 3 + KRYLOV_PRODUCTS * 2 * k * k * r
    return Cost(bytes=SINGLE * m * n + DOUBLE * k * k, float64=operations)


def loftq(m: int, n: int, r: int) -> Cost:
    moved = Cost(bytes=SINGLE * 4 * m * n)
    once = moved + Cost(float32=WARM_PRODUCTS * 2 * m * n * r)
    return sum([once] * LOFTQ_ITERATIONS, Cost())


def eva(m: int, n: int, r: int) -> Cost:
    return products(KRYLOV_PRODUCTS, n, n, r)


def lora_ga(m: int, n: int, r: int) -> Cost:
    return products(KRYLOV_PRODUCTS, m, n, 2 * r) + subtraction(m, n, r)


COSTS: dict[str, Callable[[int, int, int], Cost]] = {
    "kaiming": drawing,
    "gaussian": drawing,
    "orthogonal": drawing,
    "olora": olora,
    "pissa": pissa,
    "corda_ipm": corda_ipm,
    "corda_kpm": corda_kpm,
    "bottom": bottom,
    "loftq": loftq,
    "eva": eva,
    "lora_ga": lora_ga,
}
