"""The time of the operations that initializers are made of.

docs/gpu.md explains the expected figures by these costs. A cost far from its expectation explains
a method that is far from its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from lora_init.linalg import dense
from lora_init.linalg.thin import cholesky_qr

from .task import Task

FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
CALLS = 3


def run(task: Task) -> None:
    copies(task)
    products(task)
    if task.cuda:
        launches(task)
    thin_decompositions(task)
    eigenproblems(task)
    cholesky_factors(task)


def draw(task: Task, *shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    """Random numbers: products of zeros take less power and run faster."""
    generator = torch.Generator(task.device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=task.device).to(dtype)


def measure(
    task: Task, name: str, function: Callable[[], object], **amounts: float
) -> dict[str, object]:
    """Record the milliseconds of a call, and each amount per second.

    Returns:
        The row; an empty one if the call failed or time ran out.
    """
    if task.affords(name, 1.0):
        with task.guarded(name):
            # The timer calls once to warm up, and synchronizes a CUDA device by itself.
            timer = Timer("call()", globals={"call": function}, num_threads=torch.get_num_threads())
            seconds = timer.timeit(CALLS).median
            rates = {unit: amount / seconds for unit, amount in amounts.items()}
            return task.record.row(name, ms=1e3 * seconds, **rates)
    return {}


def copies(task: Task) -> None:
    source = draw(task, 2**22 if task.small else 2**28)
    sink = torch.empty_like(source)
    measure(task, "copy", lambda: sink.copy_(source), gb_per_s=2e-9 * source.nbytes)
    if task.cuda:
        host = torch.empty(2**26, pin_memory=True)
        copy = lambda: host.copy_(sink[: 2**26])  # noqa: E731
        measure(task, "copy to the host, pinned", copy, gb_per_s=1e-9 * host.nbytes)


def products(task: Task) -> None:
    """Square products in each precision. TF32 is switched on for its own row only."""
    size = 256 if task.small else 8192
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in (
        ("float32", FLOAT32, "highest"),
        ("tf32", FLOAT32, "high"),
        ("bfloat16", BFLOAT16, "highest"),
        ("float64", FLOAT64, "highest"),
    ):
        side = size // 2 if dtype == FLOAT64 else size
        factor = draw(task, side, side, dtype=dtype)
        torch.set_float32_matmul_precision(precision)
        try:
            multiply = lambda f=factor: f @ f  # noqa: E731
            measure(task, f"product {name} {side}", multiply, tflop_per_s=2e-12 * side**3)
        finally:
            torch.set_float32_matmul_precision(before)


def launches(task: Task) -> None:
    """The host's cost of a kernel, and of waiting for one."""
    one = torch.ones(1, device=task.device)
    measure(task, "1000 launches", lambda: [one.add_(1) for _ in range(1000)])
    measure(task, "100 synchronizations", lambda: [one.item() for _ in range(100)])


def thin_decompositions(task: Task) -> None:
    for rows, width, stack in ((256, 8, 2),) if task.small else ((4096, 24, 16), (4096, 136, 16)):
        for dtype in (FLOAT32, FLOAT64):
            many = draw(task, stack, rows, width, dtype=dtype)
            for kind, block in (("", many[0]), (f"{stack} of ", many)):
                size = f"{kind}{rows}x{width} {str(dtype)[6:]}"
                measure(task, f"Householder QR {size}", lambda x=block: torch.linalg.qr(x))
                measure(task, f"Cholesky QR {size}", lambda x=block: cholesky_qr(x))


def eigenproblems(task: Task) -> None:
    """Small eigenproblems by the library, which may use the host, and on the device."""
    for size in (16, 32) if task.small else (96, 160, 272, 544):
        block = draw(task, 2 if task.small else 16, size, size, dtype=FLOAT64)
        matrix = block @ block.mT
        name = f"eigh {len(block)} of {size}"
        measure(task, f"{name}, library", lambda m=matrix: dense.eigh(m))
        measure(task, f"{name}, device", lambda m=matrix: torch.linalg.eigh(m))


def cholesky_factors(task: Task) -> None:
    """A Cholesky factor, its inverse, and a solve compared with a product with the inverse."""
    size, width = (128, 8) if task.small else (4096, 24)
    root, block = draw(task, size, size, dtype=FLOAT64), draw(task, size, width, dtype=FLOAT64)
    gram = root @ root.T
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram)
    solve = lambda b: torch.linalg.solve_triangular(factor, b, upper=False)  # noqa: E731
    identity = torch.eye(size, dtype=FLOAT64, device=task.device)
    inverse = solve(identity)
    measure(task, f"Gram {size} float64", lambda: root.T @ root)
    measure(task, f"Cholesky {size}", lambda: torch.linalg.cholesky_ex(gram))
    measure(task, f"inverse of the factor {size}", lambda: solve(identity))
    measure(task, f"triangular solve {size}x{width}", lambda: solve(block))
    measure(task, f"product with the inverse {size}x{width}", lambda: inverse @ block)
