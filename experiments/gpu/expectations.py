"""What an H200 should take for Llama-2-7B's 224 linear layers, from counts and unit costs.

    python -m experiments.gpu.expected

The estimate is the sum of bytes, operations, launches, synchronizations and host work. Nothing here
was measured on a GPU; `unit_costs.py` measures the costs, `methods.py` the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

BANDWIDTH = 4.0e12  # bytes a second
FLOAT32, FLOAT64 = 50e12, 40e12  # operations a second of products
BFLOAT16 = 600e12  # the same on tensor cores
PARTS = 3  # of a float32 block in bfloat16
THIN_FLOAT64 = 15e12  # the same for a Gram matrix of few columns
LAUNCH, SYNCHRONIZATION = 6e-6, 20e-6
DRAW = 3.3e-9  # a normal number on the host
CORES = 16
TRANSFER = 6e9  # bytes a second, pageable memory
EIGH_96, EIGH_544 = 0.8e-3, 36e-3  # one core, float64
QR_LAUNCHES = 28
FACTOR_STEP = 2e-6  # a column of a batched Cholesky factor or triangular solve
HASHED_BYTES = 22  # read and written for a bfloat16 weight's checksum
HASH_LAUNCHES = 26
QUANTIZER_BYTES = 190  # a weight, for one pass of quantizing and dequantizing

BLOCKS = 32
SHAPES = ((4096, 4096, 4), (11008, 4096, 2), (4096, 11008, 1))  # out, in, a block
STACKS = {4096 * 4096: 16, 4096 * 11008: 5}
WEIGHTS = BLOCKS * sum(rows * columns * count for rows, columns, count in SHAPES)
MATRICES = BLOCKS * sum(count for *_, count in SHAPES)
STACKED = 28
STACKED_MOMENTS = 37  # stacks where second moments are read, which are larger than some weights
INPUTS = 4 * BLOCKS
INPUT_ENTRIES = BLOCKS * (3 * 4096**2 + 11008**2)


@dataclass(frozen=True)
class Work:
    """What one method does to every matrix, or to every distinct input.

    Attributes:
        products: products of the weight (or moment) with a block of `oversampled` columns.
        width: bytes of a number in them; 2: in parts, without a float32 copy.
        copies: bytes a weight that are read or written besides.
        qr, eigh, solves: thin decompositions, small eigenproblems, solves with a factored matrix.
        factors: Cholesky factors with their inverse.
        grams: whole Gram matrices or products of two large matrices, in float64.
        stacked: one call works on a whole stack.
        moments: it reads second moments.
        inputs: the work is on the 128 inputs and not on the 224 weights.
        draws: whether a block is drawn on the host for every matrix, and not once for all.
        quantized: passes of the quantizer.
    """

    products: float = 0
    width: int = 4
    copies: float = 14
    qr: float = 0
    eigh: float = 0
    solves: float = 0
    factors: float = 0
    grams: float = 0
    stacked: bool = True
    moments: bool = False
    inputs: bool = False
    draws: bool = True
    quantized: int = 0


# Counted for pissa, milora, loftq, eva, corda and lora_null; by analogy for the others.
# fmt: off
METHODS: dict[str, Work] = {
    "kaiming": Work(copies=0),
    "gaussian": Work(copies=0),
    "orthogonal": Work(copies=0),
    "olora": Work(products=1, width=2, copies=4, qr=1, draws=False),
    "pissa": Work(products=18, width=2, copies=4, qr=19, eigh=3, draws=False),
    "pissa_niter_4": Work(products=8, width=2, copies=4, qr=6, eigh=1),
    "milora": Work(
        products=2, width=8, qr=41, eigh=8, solves=19, factors=2, grams=1, draws=False
    ),
    "loftq": Work(products=54, qr=60, eigh=9, copies=14 + 5 * 56, quantized=6),
    "eva": Work(products=18, width=8, qr=26, eigh=5, inputs=True, copies=16, draws=False),
    "corda": Work(products=36, qr=15, eigh=3, copies=30, moments=True, draws=False),
    "corda_kpm": Work(
        products=42, width=8, qr=41, eigh=9, solves=42, factors=2, grams=2, moments=True,
        draws=False,
    ),
    "lora_null": Work(
        width=8, qr=34, eigh=7, solves=17, factors=2, moments=True, inputs=True, copies=24,
        draws=False,
    ),
    "lora_ga": Work(products=24, qr=20, eigh=4),
    "qera": Work(products=54, qr=15, eigh=3, moments=True, copies=60, quantized=1),
    "gora": Work(products=2, copies=20, stacked=False),
    "loram": Work(products=1, copies=14, draws=False),
    "matched_norm": Work(products=18, qr=19, eigh=3),
    "random_bases": Work(products=18, width=2, copies=4, qr=19, eigh=3),
}
# fmt: on
METHODS |= {
    other: METHODS[method]
    for method, others in {
        "kaiming": ("init_ab", "init_ab_subtracted", "random"),
        "milora": ("mica",),
        "loftq": ("qpissa",),
        "lora_null": ("lora_null_frozen",),
        "lora_ga": ("lora_one",),
    }.items()
    for other in others
}


def estimate(method: str, rank: int) -> dict[str, float]:
    """Seconds by cause, for the whole model."""
    work = METHODS[method]
    entries = INPUT_ENTRIES if work.inputs else WEIGHTS
    matrices = INPUTS if work.inputs else MATRICES
    stacks = STACKED_MOMENTS if work.moments or work.inputs else STACKED
    calls = stacks if work.stacked else matrices
    columns = rank + 8
    rows = entries / matrices / 4096
    flops = 2.0 * entries * columns * work.products
    square = entries / matrices if work.inputs else 4096.0**2
    flops += 4.0 * matrices * square * columns * work.solves
    rate = {2: BFLOAT16 / PARTS, 4: FLOAT32, 8: FLOAT64}[work.width]
    bytes_read = entries * (work.products * work.width + work.copies)
    bytes_read += matrices * square * work.solves * 2 * 8
    cubes = matrices * square**1.5 * (2 * work.grams + (1 / 3 + 1) * work.factors)
    thin = 8.0 * rows * columns**2 * work.qr * matrices
    space = 4 * columns
    power = 3 if space > 96 else 1
    one = EIGH_96 * (space / 96) ** power if space < 400 else EIGH_544 * (space / 544) ** 3
    together = min(CORES, matrices / calls)
    moved = 2 * 8 * space**2 * matrices * work.eigh / TRANSFER
    steps = {
        "memory": bytes_read / BANDWIDTH,
        "products": flops / rate + cubes / FLOAT64,
        "thin QR": thin / THIN_FLOAT64
        + calls * work.qr * (QR_LAUNCHES * LAUNCH + 4 * columns * FACTOR_STEP),
        "host eigenproblems": calls * work.eigh * one * max(1.0, matrices / calls / together)
        + moved,
        "launches": LAUNCH * (calls * 12 * (work.products + work.solves + 4 * work.eigh)
                              + 6 * MATRICES),
        "synchronizations": SYNCHRONIZATION * calls * (4 + 3 * work.eigh),
        "draws": DRAW * MATRICES * columns * 5083 if work.draws else 0.0,
        "quantizer": work.quantized * entries * QUANTIZER_BYTES / BANDWIDTH,
        "checksum": (HASHED_BYTES * entries / BANDWIDTH
                     + MATRICES * (HASH_LAUNCHES * LAUNCH + 2 * SYNCHRONIZATION))
        if work.quantized else 0.0,
    }  # fmt: skip
    return {name: seconds for name, seconds in steps.items() if seconds}


def seconds(method: str, rank: int) -> float | None:
    """The expected seconds of a whole model; None where there is no estimate."""
    return sum(estimate(method, rank).values()) if method in METHODS else None


def table() -> str:
    """The estimates as a Markdown table, as docs/gpu.md has them."""
    lines = ["| method | r | seconds | largest parts |", "|---|---|---|---|"]
    for method in METHODS:
        for rank in (16, 128):
            parts = sorted(estimate(method, rank).items(), key=lambda part: -part[1])
            told = ", ".join(f"{name} {taken:.2f}" for name, taken in parts[:3])
            lines.append(f"| {method} | {rank} | {seconds(method, rank):.2f} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
