"""What this machine can do, measured once a run on the threads that the contenders have.

The floors of `floors.py` are bytes and operations over these rates, and the time of a peer's full
decomposition is told in advance from that of a small one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from experiments.benchmark.timing import synchronize

STREAM_BYTES = 2**28  # far beyond any cache
DRAWN_BYTES = 2**20
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
DECOMPOSED = 768
TAKES = 5


@dataclass(frozen=True)
class Rates:
    """Per second.

    Attributes:
        bandwidth: bytes of a copy, read and written ones together.
        float32, float64: operations of a square matrix product.
        svd: the cubic operations m n min(m, n) of torch.linalg.svd in float32.
    """

    bandwidth: float
    float32: float
    float64: float
    svd: float

    def __str__(self) -> str:
        return (
            f"{self.bandwidth / 1e9:.0f} GB/s copied, products of {self.float32 / 1e9:.0f} "
            f"(float32) and {self.float64 / 1e9:.0f} GFLOP/s (float64)"
        )


def measure_rates(device: torch.device) -> Rates:
    # Random bytes: a GPU copies zeros faster than data.
    drawn = torch.randint(256, (DRAWN_BYTES,), dtype=torch.uint8, device=device)
    source = drawn.repeat(STREAM_BYTES // DRAWN_BYTES)
    sink = torch.empty_like(source)
    copied = best(lambda: sink.copy_(source), device)
    del source, sink
    square = torch.rand(DECOMPOSED, DECOMPOSED, device=device)
    decomposed = best(lambda: torch.linalg.svd(square, full_matrices=False), device, takes=2)
    return Rates(
        bandwidth=2 * STREAM_BYTES / copied,
        float32=product_rate(torch.float32, device),
        float64=product_rate(torch.float64, device),
        svd=DECOMPOSED**3 / decomposed,
    )


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    size = PRODUCT_SIZE[device.type]
    factor = torch.rand(size, size, dtype=dtype, device=device)
    result = torch.empty_like(factor)
    return 2 * size**3 / best(lambda: torch.mm(factor, factor, out=result), device)


def best(function: Callable[[], object], device: torch.device, takes: int = TAKES) -> float:
    """The least seconds of some calls after a first one: what the machine can do undisturbed."""
    function()
    seconds = []
    for _ in range(takes):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
